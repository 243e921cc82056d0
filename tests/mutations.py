"""Break the library in small ways, one line at a time, and see the unit tests fail each time.

python tests/mutations.py                      # all mutations
python tests/mutations.py certificate-sum      # some of them
python tests/mutations.py --list               # what they are

Every mutation is applied to a copy of its own, where the test files that should notice it run first, and then all other
unit tests. It is an error if a mutation survives, if its line is not in the code exactly once, or if a test that failed
fails without the mutation too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE, UNIT = "convexheads", "tests/unit"
# What the unit tests need of the repository, less what is not there yet or not Python's.
NEEDED = (PACKAGE, "tests", "pyproject.toml")
SECONDS = 600
HANGS = f"no test ends within {SECONDS} seconds"


class Mutation(NamedTuple):
    """One line of code, and the same line with a mistake.

    Attributes:
        name: of the mutation.
        file: below `convexheads/`.
        code: text that is in the file once, within one line.
        mistake: what takes its place.
        noticed_by: files below `tests/unit/`, or tests in them, that are to notice it; they run first.
    """

    name: str
    file: str
    code: str
    mistake: str
    noticed_by: str


MUTATIONS = [
    # Solvers
    Mutation(
        "aim-floor",
        "solvers/certificate.py",
        "_AIM_FLOOR = 256",
        "_AIM_FLOOR = 1",
        "test_solvers.py::test_active_sets_are_proven_to_any_tolerance",
    ),
    Mutation(
        "plan-of-first-solver",
        "solvers/base.py",
        "(solver._solve_alone if is_planned else solver._solve_flat)(problem, attach=attach)",
        "solver._solve_alone(problem, attach=attach)",
        "test_extending.py::test_a_composition_may_be_part_of_another_one",
    ),
    Mutation(
        "regularization-units",
        "solvers/kkt.py",
        "* torch.where(mean > 0, mean, 1)",
        "* torch.where(mean > 0, 1.0, 1)",
        "test_solvers.py::test_gradient_is_exact_for_any_c",
    ),
    Mutation(
        "kernel-per-task",
        "kernels/linear.py",
        "itself = features.movedim(-2, 0).unsqueeze(-2)",
        "itself = features.unsqueeze(-2)",
        "test_kernels.py::test_parameters_per_task_apply_to_the_queries_of_that_task",
    ),
    Mutation(
        "active-set-side",
        "solvers/implicit.py",
        "coef - lower < -bound_multipliers",
        "coef - lower < bound_multipliers",
        "test_numba.py::test_same_active_sets_and_solutions",
    ),
    Mutation(
        "active-set-sums",
        "solvers/native/active_set.py",
        "right, sums = (problem.linear - problem.gram @ fixed).mT, -fixed.sum(-1)",
        "right, sums = (problem.linear - problem.gram @ fixed).mT, fixed.sum(-1)",
        "test_numba.py::test_same_active_sets_and_solutions",
    ),
    Mutation(
        "interior-point-violation",
        "solvers/native/interior_point.py",
        "multiplier = point.multiplier - target / point.slack - stiffness * violation",
        "multiplier = point.multiplier - target / point.slack",
        "test_gradient_modes.py",
    ),
    Mutation(
        "admm-dual",
        "solvers/native/admm_steps.py",
        "dual, relaxation = target - coef, OVER_RELAXATION",
        "dual, relaxation = coef - target, OVER_RELAXATION",
        "test_admm.py",
    ),
    Mutation(
        "low-rank-schur",
        "solvers/kkt.py",
        "torch.diag_embed(inverse_diagonal.sum(1)) - stacked.mT @ stacked",
        "torch.diag_embed(inverse_diagonal.sum(1)) + stacked.mT @ stacked",
        "test_low_rank.py",
    ),
    Mutation(
        "refinement-diagonal",
        "solvers/kkt.py",
        "image = image + self.diagonal * x",
        "image = image - self.diagonal * x",
        "test_numba.py::test_kernel_equals_its_twin",
    ),
    Mutation(
        "projection-shift",
        "solvers/feasible_rows.py",
        "total = total + upper.sum(-1, keepdim=True)",
        "total = total + lower.sum(-1, keepdim=True)",
        "test_solvers.py::test_projection_is_the_nearest_feasible_row",
    ),
    Mutation(
        "numba-fixed",
        "solvers/native/numba_kernels.py",
        "right[i, c] = linear[i, c] - right[i, c]",
        "right[i, c] = linear[i, c] + right[i, c]",
        "test_numba.py",
    ),
    Mutation(
        "numba-diagonal",
        "solvers/native/numba_kkt.py",
        "block[a * m + a] += smoothing[i, c] + regularization",
        "block[a * m + a] += regularization",
        "test_numba.py",
    ),
    # The certificate
    Mutation(
        "certificate-sum",
        "solvers/certificate.py",
        "gap = distances.clamp_min(0).sum(-1) + (scaling",
        "gap = distances.clamp_min(0).amax(-1) + (scaling",
        "test_solvers.py::test_certificate_bounds_the_true_error",
    ),
    Mutation(
        "certificate-indefinite",
        "solvers/certificate.py",
        "gap = torch.where(indefinite, torch.inf, gap)",
        "gap = gap + 0 * indefinite",
        "test_solvers.py::test_an_indefinite_gram_matrix_proves_nothing",
    ),
    Mutation(
        "certificate-residual",
        "solvers/certificate.py",
        "distance = (coef - feasible).abs().amax((-2, -1))",
        "distance = (coef - feasible).abs().amin((-2, -1))",
        "test_solvers.py::test_certificate_tells_good_from_bad",
    ),
    Mutation(
        "certificate-rounding",
        "solvers/certificate.py",
        "return replace(certificate, rounding=torch.where(is_too_rough, sharp, rough))",
        "return replace(certificate, rounding=torch.where(is_too_rough, 0 * sharp, rough))",
        "test_solvers.py::test_certificate_allows_for_what_rounding_hides",
    ),
    Mutation(
        "numba-rounding",
        "solvers/native/numba_backend.py",
        "gap = gap + rounding",
        "gap = gap + 0 * rounding",
        "test_solvers.py::test_gap_is_at_least_the_exact_one",
    ),
    Mutation(
        "looks-flag",
        "_looks.py",
        "return bool(value) if dtype == torch.bool else not math.isfinite(value)",
        "return bool(value)",
        "test_host_reads.py",
    ),
    Mutation(
        "looks-repeat",
        "_looks.py",
        "looks.append(_Look(flag, _repeat))",
        "pass",
        "test_host_reads.py::test_call_is_repeated_if_the_first_solver_fails",
    ),
    Mutation(
        "numba-certificate",
        "solvers/native/numba_kernels.py",
        "gap += max(distance, 0.0)",
        "gap = max(distance, 0.0)",
        "test_numba.py",
    ),
    Mutation(
        "status-residual",
        "solvers/certificate.py",
        "return is_optimal & (self.residual <= tolerance**0.5)",
        "return is_optimal",
        "test_solvers.py::test_infeasible_problems_are_not_certified",
    ),
    # Gradients
    Mutation(
        "gradient-fixed",
        "solvers/implicit.py",
        "fixed = problem.active_bounds(self.at_upper, self.at_lower)",
        "fixed = problem.active_bounds(self.at_lower, self.at_upper)",
        "test_solvers.py::test_gradient_reaches_every_part_of_the_problem",
    ),
    Mutation(
        "gradient-smoothing",
        "solvers/implicit.py",
        "grad_smoothing = None if smoothing is None else -u * x",
        "grad_smoothing = None if smoothing is None else u * x",
        "test_solvers.py::test_gradient_reaches_every_part_of_the_problem",
    ),
    Mutation(
        "gradient-scale",
        "solvers/implicit.py",
        "solve(scale.unsqueeze(-1) * linear.mT, sums,",
        "solve(linear.mT, sums,",
        "test_solvers.py::test_gradient_reaches_every_part_of_the_problem",
    ),
    Mutation(
        "gradient-relaxed",
        "solvers/implicit.py",
        "linear = linear + stiffness / hessian_scale[:, None, None] * torch.where(stiffness > 0, sign * limit, 0)",
        "linear = linear - stiffness / hessian_scale[:, None, None] * torch.where(stiffness > 0, sign * limit, 0)",
        "test_gradient_modes.py",
    ),
    Mutation(
        "numba-adjoint",
        "solvers/native/numba_kkt.py",
        "x[index[c, a], c] -= row_times(blocks[c], m, a, mine)",
        "x[index[c, a], c] += row_times(blocks[c], m, a, mine)",
        "test_numba.py",
    ),
    Mutation(
        "team-race",
        "solvers/native/numba_kkt.py",
        "if i > p and lane() == p % lanes():",
        "if i > p:",
        "test_team.py::test_a_team_computes_what_one_thread_does",
    ),
    Mutation(
        "host-read",
        "solvers/native/default.py",
        'if self.on_failure == "return" and self.first.runs_on_gpu(problem):',
        "if False:",
        "test_host_reads.py",
    ),
    Mutation(
        "team-gradient",
        "solvers/native/cuda_team.py",
        "cuda.as_cuda_array(argument.detach(), sync=False)",
        "cuda.as_cuda_array(argument, sync=False)",
        "test_host_reads.py",
    ),
    Mutation(
        "team-warning",
        "solvers/native/cuda_team.py",
        "before, config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_LOW_OCCUPANCY_WARNINGS, 0",
        "before = config.CUDA_LOW_OCCUPANCY_WARNINGS",
        "test_team.py::test_small_batches_are_launched_without_a_warning",
    ),
    Mutation(
        "team-dtype",
        "solvers/native/active_set.py",
        "fits = linear.dtype == torch.float64 and linear.numel() > 0 and",
        "fits = linear.numel() > 0 and",
        "test_team.py::test_only_what_the_kernels_solve_is_left_to_them_alone",
    ),
    Mutation(
        "team-memory",
        "solvers/native/default.py",
        "plan._replace(solvers=(self.first,), max_tasks=max(1, tasks_at_once))",
        "plan._replace(solvers=(self.first,))",
        "test_team.py::test_only_what_the_kernels_solve_is_left_to_them_alone",
    ),
    Mutation(
        "graph-backward",
        "solvers/native/active_set.py",
        "return numba_backend.factorize(problem, at_upper, at_lower)",
        "return super().factorize(problem, at_upper, at_lower)",
        "test_host_reads.py",
    ),
    Mutation(
        "class-weight-copied",
        "heads/base/loss.py",
        "torch.stack([targets.new_full((), each) for each in self.class_weight])",
        "torch.tensor(self.class_weight, dtype=targets.dtype, device=targets.device)",
        "test_host_reads.py",
    ),
    Mutation(
        "check-later",
        "solvers/problem.py",
        "if failures := self.describe_failures():",
        "if failures := (self.coef.isnan().all() and self.describe_failures()):",
        "test_host_reads.py::test_failed_task_is_reported_when_somebody_looks",
    ),
    # Heads
    Mutation(
        "svm-bound",
        "heads/svm.py",
        "upper = torch.where(own, self.upper_bound(support), 0)",
        "upper = self.upper_bound(support).expand_as(targets)",
        "test_references.py",
    ),
    Mutation(
        "svm-squared-hinge",
        "heads/svm.py",
        "hinge = slacks / (2 * bound.where",
        "hinge = slacks / (bound.where",
        "test_references.py::test_one_vs_rest_equals_scikit_learn",
    ),
    Mutation(
        "one-vs-rest-targets",
        "heads/svm.py",
        "linear = 2 * targets - 1 - support.offset",
        "linear = targets - 1 - support.offset",
        "test_references.py::test_one_vs_rest_equals_scikit_learn",
    ),
    Mutation(
        "simplex-code",
        "heads/svm.py",
        "max(targets.shape[-1] - 1, 1)",
        "max(targets.shape[-1], 1)",
        "test_references.py::test_two_classes_equal_svc",
    ),
    Mutation(
        "gram-mirrored",
        "heads/base/_gram_numba.py",
        "matrix[j, i] = matrix[i, j]",
        "matrix[j, i] = matrix[i, i]",
        "test_gram.py",
    ),
    Mutation(
        "gram-recorded",
        "_functorch.py",
        "or _count_modes() > 0",
        "or _count_modes() > 9",
        "test_gram.py",
    ),
    Mutation(
        "gram-gradient",
        "heads/base/support_set.py",
        "if has_gradient or features.dtype",
        "if features.dtype",
        "test_gram.py",
    ),
    Mutation(
        "factors-unmarked",
        "heads/_linear_algebra.py",
        "not info.any():",
        "not info.all():",
        "test_closed_form.py",
    ),
    Mutation(
        "closed-form-residual",
        "heads/_closed_form.py",
        "residual = torch.addcmul(error, per_matrix(penalty), coef, value=-1)",
        "residual = 0 * error",
        "test_closed_form.py",
    ),
    Mutation(
        "closed-form-rounding",
        "heads/_closed_form.py",
        "squared = (_norm(residual) + size_of_rounding(gram, coef)).square()",
        "squared = _norm(residual).square() * 1e-12",
        "test_closed_form.py",
    ),
    Mutation(
        "compiled-factors",
        "solvers/native/numba_backend.py",
        "side = at_upper.to(torch.int8) - at_lower.to(torch.int8)",
        "side = at_upper.to(torch.int8)",
        "test_numba.py",
    ),
    Mutation(
        "stuck-steps",
        "heads/_logistic_newton.py",
        "return step_to(torch.where(worse, 0, length))[1], worse",
        "return step_to(torch.where(worse, 0, length))[1], torch.zeros_like(worse)",
        "test_logistic.py",
    ),
    Mutation(
        "chosen-tasks",
        "heads/base/fitted.py",
        "return self._map(choose, partial(choose, shape=(*batch, 1, 1)))",
        "return self._map(choose)",
        "test_fitted.py",
    ),
    Mutation(
        "evaluation-parts",
        "heads/base/fitted.py",
        "return torch.cat([self[part]._score_gathered(features, rows[part]) for part in parts])",
        "return torch.cat([self[: len(rows[part])]._score_gathered(features, rows[part]) for part in parts])",
        "test_episodes.py",
    ),
    Mutation(
        "rows-named",
        "heads/base/fitted.py",
        "return call_explained(partial(self, query), InputError, partial(inspect_values, check_used_rows, query, rows))",
        "return self(query)",
        "test_rows.py",
    ),
    Mutation(
        "rows-square",
        "heads/base/_rows_numba.py",
        "bias[t, c] + x_shift, bias[t, c] + y_shift",
        "bias[t, c] + x_shift, bias[t, c]",
        "test_rows.py",
    ),
    Mutation(
        "rows-range",
        "heads/base/inputs.py",
        "if (validate or rows.is_cpu) and not",
        "if validate and not",
        "test_rows.py",
    ),
    Mutation(
        "rows-quadratic",
        "heads/base/fitted.py",
        "if form is None or self.expansion.quadratic is not None or k > n:",
        "if form is None or k > n:",
        "test_rows.py",
    ),
    Mutation(
        "copied-parameters",
        "heads/base/copies.py",
        "changed |= parameters",
        "changed |= {}",
        "test_rows.py",
    ),
    Mutation(
        "rows-gradient",
        "heads/base/fitted.py",
        "if torch.is_grad_enabled() and any(value.requires_grad for value in (features, *terms)):",
        "if torch.is_grad_enabled() and features.requires_grad:",
        "test_rows.py",
    ),
    Mutation(
        "rows-combined",
        "heads/base/_rows_numba.py",
        "coef[second, c] if second > first else 0.0",
        "coef[second, c]",
        "test_rows.py",
    ),
    Mutation(
        "rows-shared",
        "heads/base/fitted.py",
        "if has_weights or shared_from(features, dims) < dims or is_large:",
        "if has_weights or is_large:",
        "test_rows.py",
    ),
    Mutation(
        "closed-form-weights",
        "heads/_closed_form.py",
        "slope = _norm(gradient) + rounding",
        "slope = rounding",
        "test_closed_form.py::test_errors_of_weights_bound_the_actual_ones",
    ),
    Mutation(
        "closed-form-policy",
        "heads/_closed_form.py",
        "check(doubt(), handle)",
        "pass",
        "test_closed_form.py",
    ),
    Mutation(
        "closed-form-proof",
        "heads/_closed_form.py",
        "limit = ZERO_GAP**0.5 / (4 * (self.factor.shape[-1] + 2) * torch.finfo(self.factor.dtype).eps)",
        "limit = 1e16",
        "test_closed_form.py::test_an_error_is_raised_exactly_where_the_certificate_says_failed",
    ),
    Mutation(
        "closed-form-copies",
        "heads/base/fitted.py",
        "return map_parts(replace(self, expansion=self.expansion.certified()), *changes)",
        "return map_parts(self, *changes)",
        "test_fitted.py",
    ),
    Mutation(
        "contiguous-logits",
        "heads/base/fitted.py",
        "return scores.to(self.dtype, memory_format=torch.contiguous_format)",
        "return scores.to(self.dtype)",
        "test_heads.py",
    ),
    Mutation(
        "label-of-an-absent-class",
        "heads/base/inputs.py",
        "is_own &= (classes < per_task.unsqueeze(-1)).unsqueeze(-2)",
        "pass",
        "test_inputs.py",
    ),
    Mutation(
        "label-out-of-range",
        "heads/base/classification.py",
        "targets = targets / is_own.any(-1, keepdim=True)  # NaN for a label out of range",
        "pass",
        "test_inputs.py",
    ),
    Mutation(
        "discriminant-primal",
        "heads/discriminant.py",
        "bias = priors.log() - (means * weight.mT).sum(-1) / 2",
        "bias = priors.log() - (means * weight.mT).sum(-1)",
        "test_closed_form.py",
    ),
    Mutation(
        "mahalanobis-primal",
        "heads/discriminant.py",
        "quadratic=-squared * inverse / 2,",
        "quadratic=-inverse / 2,",
        "test_closed_form.py",
    ),
    Mutation(
        "mahalanobis-certificate",
        "heads/discriminant.py",
        "parts = (length * inverse * length.mT).flatten(-2)",
        "parts = 0 * (length * inverse * length.mT).flatten(-2)",
        "test_closed_form.py",
    ),
    Mutation(
        "ridge-primal",
        "heads/ridge.py",
        "weight = system.solve(multiply(rows.mT, values))",
        "weight = system.solve(multiply(rows.mT, values)) / 2",
        "test_references.py::test_ridge_equals_scikit_learn",
    ),
    Mutation(
        "logistic-rescaling",
        "heads/logistic.py",
        "solution = self._certified(coef / penalty, gap, error, taken)",
        "solution = self._certified(coef, gap, error, taken)",
        "test_references.py::test_logistic_regression_equals_scikit_learn",
    ),
    Mutation(
        "logistic-primal-features",
        "heads/_primal/gradient.py",
        "to_features = -(used * slope) @ v.mT - curved @ weight.mT",
        "to_features = -curved @ weight.mT",
        "test_logistic.py::test_gradients_agree_with_central_differences",
    ),
    Mutation(
        "logistic-primal-gap",
        "heads/_primal/problem.py",
        "gap = gradient.square().sum((-2, -1)) / (2 * penalty)",
        "gap = gradient.square().sum((-2, -1)) / 2",
        "test_logistic.py::test_the_gap_bounds_the_distance_to_the_optimum",
    ),
    Mutation(
        "logistic-dual-gap",
        "heads/_logistic_newton.py",
        "gap, tiny = lost + distance.clamp_min(0) / 2,",
        "gap, tiny = lost + distance.clamp_min(0) / 20,",
        "test_logistic.py::test_the_gap_in_the_dual_bounds_the_distance_to_the_optimum",
    ),
    Mutation(
        "logistic-error-of-weights",
        "heads/_primal/problem.py",
        "2 * gap / quadratic.clamp_min(tiny)",
        "gap / quadratic.clamp_min(tiny) / 2",
        "test_logistic.py::test_the_gap_bounds_the_distance_to_the_optimum",
    ),
    Mutation(
        "warm-start-of-kernel",
        "solvers/native/numba_kernels.py",
        "elif multiplier < 0 and lower[i, c] > -np.inf:",
        "elif multiplier < 0 and lower[i, c] > np.inf:",
        "test_numba.py::test_kernel_equals_its_twin",
    ),
    Mutation(
        "warm-start-from-scratch",
        "solvers/native/active_set.py",
        "start = _first_guess(replace(problem, start=None)).where(~unsolved, solved)",
        "start = solved",
        "test_warm_start.py::test_any_start_leads_to_the_solution",
    ),
    Mutation(
        "warm-start-in-a-basis",
        "heads/_primal/strategy.py",
        "inside.copy_(basis.enter(zero))",
        "inside.copy_(-basis.enter(zero))",
        "test_warm_start.py::test_a_start_in_the_primal_takes_fewer_steps",
    ),
    Mutation(
        "logistic-kernel",
        "heads/_logistic_numba.py",
        "residual[i, c] = coef[i, c] + sample_weight[i] * slope[i, c]",
        "residual[i, c] = coef[i, c] + slope[i, c]",
        "test_logistic_numba.py::test_kernels_equal_their_twins",
    ),
    Mutation(
        "primal-kernel",
        "heads/_primal/compiled.py",
        "image[i, c] = sample_weight[i] * p[i, c] * (image[i, c] - mean)",
        "image[i, c] = p[i, c] * (image[i, c] - mean)",
        "test_primal_numba.py::test_kernels_equal_their_twins",
    ),
    Mutation(
        "bias-of-active-examples",
        "heads/_primal/steps.py",
        "part, bias[chosen] = part - ones * shift.unsqueeze(-1), -shift",
        "part, bias[chosen] = part - ones * shift.unsqueeze(-1), shift",
        "test_primal.py::test_steps_of_the_squared_hinge",
    ),
    Mutation(
        "basis-outside",
        "heads/_primal/basis.py",
        "(outer - self._leave_columns(inside)) / penalty[..., None, None]",
        "outer / penalty[..., None, None]",
        "test_logistic.py::test_gradients_agree_with_central_differences",
    ),
    Mutation(
        "balanced-classes",
        "heads/base/loss.py",
        "present.sum(-1, keepdim=True) * totals",
        "totals",
        "test_weighted.py::test_logistic_regression_agrees_with_scikit_learn",
    ),
    Mutation(
        "intercept-step",
        "solvers/intercept.py",
        "bias + constant[..., None] * excess",
        "bias - constant[..., None] * excess",
        "test_weighted.py::test_weights_and_priors_agree_with_cvxpy",
    ),
    Mutation(
        "intercept-balance",
        "heads/_losses.py",
        "change = received - fraction * p",
        "change = -fraction * p",
        "test_weighted.py::test_slopes_are_balanced",
    ),
    Mutation(
        "leave-one-out-ridge",
        "heads/ridge.py",
        "scores = (fitted - hat * own)",
        "scores = (fitted - own)",
        "test_held_out.py::test_leaving_one_out_equals_refits",
    ),
    Mutation(
        "leave-one-out-vectors",
        "heads/svm.py",
        "size > 1e-9 * size.amax(-1, keepdim=True)",
        "size > 0.5 * size.amax(-1, keepdim=True)",
        "test_held_out.py::test_leaving_one_out_equals_refits",
    ),
    Mutation(
        "conformal-rank",
        "heads/base/temperature.py",
        "rank = ((count + 1) * coverage).ceil().long()",
        "rank = (count * coverage / 2).ceil().long()",
        "test_held_out.py::test_prediction_sets_cover_the_right_class",
    ),
    Mutation(
        "tuning-fold",
        "tuning/_folds.py",
        "used.unsqueeze(1) & ~left_out",
        "used.unsqueeze(1) & left_out",
        "test_tuning.py::test_scores_are_those_of_single_fits",
    ),
    Mutation(
        "tuning-ties",
        "tuning/search.py",
        "len(indices) - 1).amin(-1)",
        "-1).amax(-1)",
        "test_tuning.py::test_scores_are_those_of_single_fits",
    ),
    Mutation(
        "prototype-bias",
        "heads/prototype.py",
        "bias = -(mean * multiply(gram, mean)).sum(-2)",
        "bias = -(mean * multiply(gram, mean)).mean(-2)",
        "test_heads.py::test_mask_equals_leaving_out",
    ),
    Mutation(
        "mask-in-gram",
        "heads/base/support_set.py",
        "both = mask.unsqueeze(-1) & mask.unsqueeze(-2)",
        "both = mask.unsqueeze(-1) | mask.unsqueeze(-2)",
        "test_heads.py::test_mask_equals_leaving_out",
    ),
    Mutation(
        "kernel-width",
        "_gram.py",
        "* torch.where(median > 0, median, 1).sqrt()",
        "* torch.where(median > 0, median, 1)",
        "test_regression.py::test_median_width_is_that_of_each_task",
    ),
    Mutation(
        "fit-owns-its-memory",
        "heads/base/head.py",
        "return value.to(dtype, copy=True)",
        "return value.to(dtype)",
        "test_unusual_tensors.py::test_a_fit_shares_no_memory_with_the_caller",
    ),
    Mutation(
        "kernel-symmetry",
        "_validation.py",
        "wrong = difference > 1e-6 * size",
        "wrong = difference > 1e6 * size",
        "test_unusual_tensors.py::test_kernels_are_symmetric",
    ),
    # Episodes and their loader
    Mutation(
        "split-off-by-one",
        "episodes.py",
        "in_support = same.tril(-1).sum(-1) < min(shots, n)",
        "in_support = same.tril(-1).sum(-1) <= min(shots, n)",
        "test_episodes.py",
    ),
    Mutation(
        "evaluation-ranks",
        "_sampling.py",
        "[(rank - start) % world_size :: world_size]",
        "[(0 - start) % world_size :: world_size]",
        "test_episodes.py::test_processes_share_an_evaluation",
    ),
    Mutation(
        "evaluation-threads",
        "_sampling.py",
        "        torch.set_num_threads(threads)",
        "        pass",
        "test_episodes.py::test_small_episodes_use_one_thread_each",
    ),
    Mutation(
        "loader-new-epoch",
        "loader.py",
        "epoch, done = epoch + (done > 0), 0",
        "epoch, done = epoch, 0",
        "test_loader.py::test_an_iteration_that_was_left_early_is_not_continued",
    ),
    Mutation(
        "loader-resume",
        "loader.py",
        'self.step, self._resume_within_epoch = _check_count("step", state.get("step")), True',
        'self.step, self._resume_within_epoch = _check_count("step", state.get("step")), False',
        "test_loader.py::test_a_resumed_loader_continues_where_it_stood",
    ),
    Mutation(
        "loader-ranks",
        "loader.py",
        "return range(self.rank, self.batch_size, self.world_size)",
        "return range(0, self.batch_size, self.world_size)",
        "test_loader.py",
    ),
    Mutation(
        "loader-indices",
        "loader.py",
        "self._draw(step, task)[0]",
        "self._draw(step + 1, task)[0]",
        "test_loader.py::test_indices_are_those_of_the_samples",
    ),
    Mutation(
        "loader-replacement",
        "loader.py",
        "draw.choice(self.members[label], self.samples_per_class, replace=False)",
        "draw.choice(self.members[label], self.samples_per_class, replace=True)",
        "test_loader.py",
    ),
    # Files
    Mutation(
        "storage-checksum",
        "_storage.py",
        "digest.update(repr((name, value.dtype, tuple(value.shape))).encode())",
        "digest.update(repr((name, value.dtype)).encode())",
        "test_storage.py",
    ),
    Mutation(
        "storage-atomic",
        "_storage.py",
        'part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")',
        "part = path",
        "test_storage.py",
    ),
    Mutation(
        "storage-durable",
        "_storage.py",
        "os.fsync(file.fileno())",
        "file.flush()",
        "test_storage.py",
    ),
]


def unusable(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """What is wrong with mutations of the code in `root`, one line each."""
    wrong = []
    for mutation in mutations:
        count = (root / PACKAGE / mutation.file).read_text().count(mutation.code)
        if count != 1:
            wrong.append(f"{mutation.name}: expected its code in {mutation.file} once, got it {count} times")
        if "\n" in mutation.code + mutation.mistake or mutation.code == mutation.mistake:
            wrong.append(f"{mutation.name}: expected another version of one line")
        if not (root / UNIT / mutation.noticed_by.partition("::")[0]).is_file():
            wrong.append(f"{mutation.name}: expected a file in {UNIT}, got {mutation.noticed_by}")
    names = [mutation.name for mutation in mutations]
    return wrong + [f"{name}: expected one mutation of this name" for name in set(names) if names.count(name) > 1]


@contextmanager
def copied(root: Path, mutation: Mutation | None = None) -> Iterator[Path]:
    """A copy of what the tests need, with what Python and Numba compiled before, except for the mutated file."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in NEEDED:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name)
            else:
                shutil.copy2(root / name, copy / name)
        if mutation is not None:
            file = copy / PACKAGE / mutation.file
            file.write_text(file.read_text().replace(mutation.code, mutation.mistake))
            kernels = "numba_*" if file.stem.startswith("numba_") else f"{file.stem}.*"
            for compiled in (file.parent / "__pycache__").glob(kernels):  # Numba overlooks changes of other files
                compiled.unlink()
        yield copy


def first_failure(folder: Path, tests: Sequence[str]) -> str | None:
    """Run tests until one fails, and return its name; None where all of them pass."""
    options = ("-x", "--quiet", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--hypothesis-profile=brief")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return HANGS
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (1, 2) or not failed:  # failed tests, and files that can't be imported
        raise RuntimeError(f"pytest {' '.join(tests)}\n{done.stdout}{done.stderr}")
    return failed[1]


def noticed(mutation: Mutation, root: Path) -> str | None:
    """The test that notices the mutation; None where it survives."""
    with copied(root, mutation) as folder:
        likely = f"{UNIT}/{mutation.noticed_by}"
        return first_failure(folder, [likely]) or first_failure(folder, [f"--deselect={likely}", UNIT])


def run(mutations: Sequence[Mutation], root: Path, jobs: int) -> bool:
    """Try all mutations, print what becomes of each, and return whether all is as it should be."""

    def timed(mutation: Mutation) -> tuple[str | None, float]:
        begin = time.perf_counter()
        return noticed(mutation, root), time.perf_counter() - begin

    survivors, failures = [], []
    with ThreadPoolExecutor(jobs) as pool:
        for number, (mutation, (by, seconds)) in enumerate(zip(mutations, pool.map(timed, mutations), strict=True), 1):
            print(
                f"{number:2} of {len(mutations)}  {mutation.name:24} {seconds:5.1f} s  {by or 'SURVIVES'}", flush=True
            )
            (failures if by else survivors).append(by or mutation.name)
    with copied(root) as folder:  # or whatever fails would pass for a test that notices
        also = first_failure(folder, sorted({*failures} - {HANGS})) if {*failures} - {HANGS} else None
    if survivors:
        print(f"No test notices: {', '.join(survivors)}. Write one, or remove code that does nothing.")
    if also:
        print(f"A test fails without any mutation: {also}.")
    return not survivors and not also


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tests/mutations.py",
        description="Break the library in small ways, one line at a time, and see the unit tests fail each time. Works on "
        "temporary copies. Exit code 1 where a mutation survives, or where a test fails without one.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; all of them by default")
    parser.add_argument("--list", action="store_true", help="show what the mutations are, and stop")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="number of parallel processes; default %(default)s",
    )
    options = parser.parse_args(arguments)
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"expected names of mutations (see --list), got {', '.join(unknown)}")
    chosen = [known[name] for name in options.names] or MUTATIONS
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name}: {PACKAGE}/{mutation.file}\n  - {mutation.code}\n  + {mutation.mistake}")
        return 0
    if wrong := unusable(MUTATIONS, ROOT):
        print(*wrong, sep="\n")
        return 1
    return 0 if run(chosen, ROOT, options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
