"""Coverage-guided fuzzing of the reader and of templating, and what both are held against: `make fuzz`."""
