"""What stands in a trained model's README: fed a record of the run, it knows no Trainer."""
