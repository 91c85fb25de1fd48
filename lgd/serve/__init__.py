"""The service: predictions, queries and the atlas of slides over HTTP and in a browser, under Ray Serve."""
