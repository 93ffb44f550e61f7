"""Pictures of the pages, drawn as SVG from what the reference computes: one file per concept."""
