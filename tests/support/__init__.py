"""What several tests share: builders of records, tiny checkpoints, plants, runs. No test is in here."""
