"""Trainings whose config is Python: Detectron2's LazyConfigs."""
