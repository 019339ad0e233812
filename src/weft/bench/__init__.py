"""Measuring a running server: what is asked of it (traffic), how (client, load), and what came of it (stats, report).

It drives any OpenAI-compatible server, knows nothing of weft's engine, and is light, because it often shares its cores
with the server that it measures.
"""
