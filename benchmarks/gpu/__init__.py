"""Everything that needs a GPU: stages, the queue of training runs, and the archive of their results."""
