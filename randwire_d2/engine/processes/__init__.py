"""The processes of a training: how they start, agree, share their machine, and end together."""
