"""Fuzzed names and files of trained weights: what is loaded is what was saved, everything else is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import anything, outcome
from tasks import examples

import convexheads as ch
from convexheads.models.pretrained import WEIGHTS_DIR, save_pretrained


def check_pretrained(loaded: ch.models.Pretrained) -> None:
    assert isinstance(loaded.backbone, torch.nn.Module)
    assert isinstance(loaded.head, ch.ClassificationHead)


@pytest.mark.usefixtures("unchecked")
@examples(2, nightly=50)
@given(anything)
def test_names_of_weights(name):
    loaded = outcome(lambda: ch.load_pretrained(name))
    if loaded is not None:
        check_pretrained(loaded)


def test_files_of_weights(tmp_path):
    """Whatever is loaded is what was saved, to the last bit."""
    backbone, head, told = ch.load_pretrained(WEIGHTS_DIR / "conv4-cifar-fs-svm.safetensors")
    save_pretrained(tmp_path / "whole.safetensors", backbone, head, told)
    content = (tmp_path / "whole.safetensors").read_bytes()

    anywhere = st.integers(0, len(content) - 1)

    @examples(12, nightly=600)
    @given(anywhere, st.binary(max_size=9), st.booleans(), st.integers(0, 3000) | anywhere)
    def check(end, other, cut, start):
        spoilt = content[:end] if cut else content[:start] + other + content[start + len(other) :]
        (tmp_path / "spoilt.safetensors").write_bytes(spoilt)
        loaded = outcome(lambda: ch.load_pretrained(tmp_path / "spoilt.safetensors"))
        if loaded is not None:
            check_pretrained(loaded)
            assert loaded.settings == told
            for own, saved in ((loaded.backbone, backbone), (loaded.head, head)):
                torch.testing.assert_close(own.state_dict(), saved.state_dict(), rtol=0, atol=0, equal_nan=True)

    check()
