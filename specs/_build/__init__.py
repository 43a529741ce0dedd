"""Makes the site, and what is generated: `python -m specs._build.refresh`."""
