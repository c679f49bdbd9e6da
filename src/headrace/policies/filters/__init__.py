"""What the filter steps are made of: patterns, detectors, and the matcher that works on streams.

From the bottom: `syntax` takes a pattern apart, `automaton` and `words` run over text one character at a time,
`personal` holds the built-in detectors, `stream` masks one text, `logprob_mask` keeps its log-probabilities in
step, and `rules` makes all of it from the configuration.
"""
