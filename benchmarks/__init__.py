"""kubegraft beside what people do otherwise, measured in one run: `make benchmark DATA=folder`.

Every contestant is a process of its own. `contest` says who they are, `measuring` starts and watches them,
`arithmetic` makes comparisons of what was seen, and `page` writes docs/benchmarks.md.
"""
