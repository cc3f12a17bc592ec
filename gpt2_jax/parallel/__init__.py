"""The mesh, layouts, and products across it."""
