"""The benchmarks behind docs/results: each writes raw lines under docs/results/raw, `bench.results` reads them."""
