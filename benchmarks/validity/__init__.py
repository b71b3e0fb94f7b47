"""Ground truth for token weights: three measurements where it is known which tokens should count.

`noise` asks whether low weight finds tokens that were replaced by random ones, `learning` whether weights help a model
that learns from such data, `faults` whether a critic's value falls at the faulty line of a program. The entry point is
`benchmarks/weighting_validity.py`; docs/validity.md holds what came out.
"""
