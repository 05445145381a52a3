"""The nouns of Retuner: all the knowledge, no Prefect. Imports point here, never out of here."""
