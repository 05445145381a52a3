"""The verbs: one file a stage. Each says what the stage depends on and which noun does the work."""
