"""From an imported model to an executable: `compile`, the pipeline, lowering, targets."""
