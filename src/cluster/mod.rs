//! A Kubernetes API server: which objects live in it, what it says of tokens, and what its keys are.
