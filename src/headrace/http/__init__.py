"""HTTP: the wire of each dialect, its translation to and from a `Call`, SSE, and problems."""
