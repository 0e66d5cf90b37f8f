"""All pictures: wirings, training curves, detections. No module here reads the folder of a run."""
