"""The GPU of this machine, predicted against measured."""
