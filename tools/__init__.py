"""What is run from a checkout and is in no wheel: jobs, benchmarks, studies."""
