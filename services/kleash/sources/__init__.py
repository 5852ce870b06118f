"""Where model folders come from: the Hub, object stores, web servers, volumes that others fill.

No torch and no grpc: an init container runs it in a second and in little memory.
"""
