"""The system under test: LoadGen on one side, the pipeline on the other."""
