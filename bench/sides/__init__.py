"""Programs that hold one side of a comparison in a process of its own."""
