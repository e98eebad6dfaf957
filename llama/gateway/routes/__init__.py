"""The routes of both APIs. Their paths have no leading `/v1`: the middleware removes it."""
