"""The docks: the only room that knows Qt and napari."""
