"""Steps of the journey, one a file."""
