"""Headrace serves a language model over HTTP and guards it with what a public API needs."""

__version__ = "0.1.0"
