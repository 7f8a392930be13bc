"""What every folder stands on: errors, config, schemas, artifacts, stores, readers, the run record."""
