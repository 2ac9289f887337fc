"""For tests on a GPU: a call captured by a CUDA graph."""

import torch


def captured(call):
    """A graph of one `call`, and what that returned: each replay writes into it anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch asks for a warm-up beside the default stream
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result
