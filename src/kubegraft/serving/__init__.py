"""A small HTTP server for an exported model, with the REST protocol of TensorFlow Serving and KServe's V1.

    protocol     requests and answers as JSON; no TensorFlow, no sockets
    model        the SavedModel: found, checked, loaded, asked
    connections  one HTTP connection: deadlines, sizes, what is answered where
    server       the listening socket, its threads, limits and the end
    serve        `kubegraft serve`: from a URI to a server, and signals

Docs: docs/operations.md, "A model server"; why it exists: docs/adr/0011-a-small-model-server.md.
"""
