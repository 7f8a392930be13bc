"""An encoder as one standard checkpoint."""
