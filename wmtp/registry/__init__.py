"""Model versions in MLflow's registry: registered with their origin, promoted by evidence, described by a card."""
