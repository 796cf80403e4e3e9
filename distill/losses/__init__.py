"""Pure functions: tensors in, a scalar (or one value a sample) out; no network, no randomness."""
