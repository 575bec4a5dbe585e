"""Reference models of what kernels compute, to test the kernels against."""
