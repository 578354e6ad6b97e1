"""Repairs of config.json: candidates, which headers judge."""
