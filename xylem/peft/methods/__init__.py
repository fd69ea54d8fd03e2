"""One file a method, each with the same functions: graft, trainable, and what is its own.

graft(params, key, config) -> params       the tree with what the method adds
trainable(params, config) -> predicate     of (path, weight): what learns
"""
