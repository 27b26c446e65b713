"""ONNX files written by hand, for want of the package onnx."""

from __future__ import annotations


def field(number, *values):
    """A field of a protobuf message: a whole number, text, or messages."""
    content = b""
    for value in values:
        if isinstance(value, int):
            content += varint(number << 3) + varint(value)
        else:
            encoded = value.encode() if isinstance(value, str) else value
            content += varint(number << 3 | 2) + varint(len(encoded)) + encoded
    return content


def varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def stripes(batch="n", size=(256, 128), count=8):
    """(N, 3, H, W) to (N, 3 * count), the means of stripes; a batch of one size where a number is given."""

    def tensor(name, *sizes):
        dims = b"".join(field(1, field(1, size) if isinstance(size, int) else field(2, size)) for size in sizes)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    def numbers(name, *values):
        return field(5, field(1, name) + field(20, 7) + field(8, *values))

    height, width = size[0] // count, size[1]
    pool = field(1, "images") + field(2, "means") + field(4, "AveragePool")
    pool += numbers("kernel_shape", height, width) + numbers("strides", height, width)
    flat = field(1, "means") + field(2, "features") + field(4, "Flatten")
    graph = field(1, pool, flat) + field(2, "stripes")
    graph += field(11, tensor("images", batch, 3, *size)) + field(12, tensor("features", batch, 3 * count))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))
