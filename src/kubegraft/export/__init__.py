"""Models in the form that servers load, proved to answer like the trained one."""
