"""Measurements: what the library costs beside its peers, on the machine at hand."""
