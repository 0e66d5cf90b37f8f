"""What a training does beside its steps: it saves, averages, evaluates, stops."""
