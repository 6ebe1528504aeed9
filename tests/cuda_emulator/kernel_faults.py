"""Deliberate faults in the kernels, by what is wrong with them."""

from __future__ import annotations

from typing import NamedTuple

from host_build import Patch


class Fault(NamedTuple):
    """One fault, and the type whose kernels have it."""

    patch: Patch
    kind: str = "float16"


def fault(file: str, old: str, new: str, kind: str = "float16") -> Fault:
    return Fault(Patch(f"cuda/{file}", old, new), kind)


FAULTS: dict[str, Fault] = {
    "rows_product: no barrier before the product": fault(
        "rows_product.cuh",
        "    __syncthreads();  // the stage is whole; everyone is done with the one before\n",
        "",
    ),
    "rows_product: no barrier before the epilogue": fault(
        "rows_product.cuh", "  __syncthreads();  // the ring becomes the epilogue's\n", ""
    ),
    "rows_product: no barrier before the only stage is filled again": fault(
        "rows_product.cuh",
        "      __syncthreads();  // everyone is done with the only stage\n",
        "",
    ),
    "rows_product: the wait leaves a stage too many under way": fault(
        "rows_product.cuh", "ptx::cp_async_wait<1>();", "ptx::cp_async_wait<2>();"
    ),
    "rows_product: a row too many": fault(
        "rows_product.cuh", "return r < rows ? r", "return r <= rows ? r"
    ),
    "conv3x3_product: no barrier before the product": fault(
        "conv3x3_product.cuh",
        "        __syncthreads();\n        // The next step's pixels",
        "        // The next step's pixels",
    ),
    "conv3x3_product: the wait leaves a group too many under way": fault(
        "conv3x3_product.cuh",
        "ptx::cp_async_wait<kLines ? 0 : 1>();",
        "ptx::cp_async_wait<kLines ? 0 : 2>();",
    ),
    "conv3x3_product: the next pixels before everyone is done with these": fault(
        "conv3x3_product.cuh",
        "        __syncthreads();\n"
        "        // The next step's pixels: not before everyone is done with those whose place "
        "they take.\n"
        "        if (is_first && step + 1 < last) start_halo(step + 1);\n",
        "        if (is_first && step + 1 < last) start_halo(step + 1);\n"
        "        __syncthreads();\n",
    ),
    "conv3x3_product: coefficients before all lanes have copied them": fault(
        "conv3x3_product.cuh",
        "          __syncwarp();  // the coefficients are those that its lanes have copied\n",
        "",
    ),
    "rows_product: coefficients before all lanes have copied them": fault(
        "rows_product.cuh",
        "      __syncwarp();  // the coefficients are those that its lanes have copied\n",
        "",
    ),
    "conv3x3: all parts of a tile are the first": fault(
        "conv3x3_product.cuh", "part = g.parts.remainder(block, tile);", "part = 0;"
    ),
    "the last split of rows is not added": fault(
        "pointwise.cu",
        "for (int s = 0; s < splits; ++s) whole",
        "for (int s = 1; s < splits; ++s) whole",
    ),
    "a split too short by a step": fault(
        "rows_product.cuh",
        "const int last = first + split_steps < weight.steps ? first + split_steps",
        "const int last = first + split_steps < weight.steps ? first + split_steps - 1",
    ),
    "conv3x3: a column of pixels too many": fault(
        "conv3x3_product.cuh", "px >= grid.w", "px > grid.w"
    ),
    "pixel_product: no barrier before the product": fault(
        "pixel_product.cuh",
        "    __syncthreads();\n    if (stages == 2) start(other, row + kPixels);",
        "    if (stages == 2) start(other, row + kPixels);",
    ),
    "pixel_product: no wait for the copies": fault(
        "pixel_product.cuh",
        "    ptx::cp_async_wait<0>();\n    operand_i.finish(stage, kPixels, pixel_of);",
        "    operand_i.finish(stage, kPixels, pixel_of);",
    ),
    "pixel_product: splits overlap": fault(
        "pixel_product.cuh",
        "begin + rows_per_split < rows ? begin + rows_per_split : rows",
        "begin + rows_per_split + kStagePixels<E> < rows "
        "? begin + rows_per_split + kStagePixels<E> : rows",
    ),
    "tap_product: no barrier before the product": fault(
        "pixel_product.cuh",
        "    __syncthreads();\n    if (stages == 2) start(other, tile + 1);",
        "    if (stages == 2) start(other, tile + 1);",
    ),
    "tap_product: no barrier before the only stage is filled again": fault(
        "pixel_product.cuh",
        "      __syncthreads();\n      start(stage, tile + 1);",
        "      start(stage, tile + 1);",
    ),
    "the operand's rows are swapped in ldmatrix": fault(
        "mma.cuh",
        "return handle % 2 * 16 + lane % 16;",
        "return handle % 2 * 16 + (lane ^ 8) % 16;",
    ),
    "the weights' halves are swapped in ldmatrix": fault(
        "mma.cuh",
        "const int column = ni * 8 + lane % 8 + lane / 16 * 8;",
        "const int column = ni * 8 + lane % 8 + lane / 8 % 2 * 8;",
    ),
    "two registers of a tf32 fragment are swapped": fault(
        "mma.cuh",
        "        af[mi][1] = value(a, a0, mi * 16 + g + 8);\n"
        "        af[mi][2] = value(a, a1, mi * 16 + g);",
        "        af[mi][2] = value(a, a0, mi * 16 + g + 8);\n"
        "        af[mi][1] = value(a, a1, mi * 16 + g);",
        "tf32",
    ),
    "padding is activated": fault(
        "conv3x3_product.cuh", "          if (!Source::exists(places[i])) continue;\n", ""
    ),
    "operands are not rounded to tf32": fault(
        "mma.cuh", "return __uint_as_float(ptx::float_to_tf32(x));", "return x;", "tf32"
    ),
    "the channels of a last, partial piece are dropped": fault(
        "sources.cuh",
        "exists ? x.c - channel : 0, x.alignment",
        "exists && channel + kPieceElements<E> <= x.c ? x.c - channel : 0, x.alignment",
    ),
    "a piece too wide at the last channels": fault(
        "types.cuh",
        "        if (e < valid) element(e);",
        "        if (e <= valid) element(e);",
    ),
    "rows of words are taken for rows of pieces": fault(
        "types.cuh", "return bits % 16 == 0 ? 16 : bits % 8", "return bits % 4 == 0 ? 16 : bits % 8"
    ),
    "NaN is rectified to zero": fault(
        "types.cuh", "return x <= A(0) ? A(0) : x;", "return x > A(0) ? x : A(0);"
    ),
    "no barrier between the lanes of a slice": fault(
        "epilogue.cuh", "    __syncwarp();\n    Slice<E> slice;", "    Slice<E> slice;"
    ),
    "no barrier before a slice is overwritten": fault(
        "epilogue.cuh", "    __syncwarp();\n    A pairs", "    A pairs"
    ),
    "tiles merge without the distance of their means": fault(
        "partials.cuh", "m2 += other.m2 + delta * delta * share * count;", "m2 += other.m2;"
    ),
    "tiles merge with the wrong weight": fault(
        "partials.cuh", "share = other.count / total;", "share = count / total;"
    ),
    "statistics count the rows outside": fault(
        "epilogue.cuh", "const int count = __popc(rows);", "const int count = 32;"
    ),
    "statistics of values before they are rounded": fault(
        "epilogue.cuh", "          slice.value[i][v] = widen(piece.element[v]);", "          "
    ),
    "no barrier between the runs of a reduction": fault(
        "reductions.cuh",
        "    __syncthreads();\n    if (static_cast<int>(threadIdx.y) < half)",
        "    if (static_cast<int>(threadIdx.y) < half)",
    ),
    "a norm is not made behind its statistics": fault(
        "reductions.cuh", "  if (next.channels) next.make(before + c, all.mean, v);\n", ""
    ),
    "a norm's first channels are not made": fault(
        "reductions.cuh",
        "if (c < 0) return next.make(before + c, next.mean[before + c], next.var[before + c]);",
        "if (c < 0) return;",
    ),
    "deferred sums start anew": fault("reductions.cuh", "beta, sum_grad[c]);", "beta, A(0));"),
    "a norm's backward without its mean": fault(
        "reductions.cuh", "beta * inverse - multiply(q, norm.mean[c]);", "beta * inverse;"
    ),
    "all norms are the first": fault(
        "pointwise.cu", "const auto& u = table.one[blockIdx.y];", "const auto& u = table.one[0];"
    ),
    "offsets of rows have 32 bits": fault(
        "sources.cuh",
        "x.data + place + (channel + shift) : x.data;",
        "x.data + static_cast<int>(place) + (channel + shift) : x.data;",
    ),
    "the taps of the data gradient are not reversed": fault(
        "weights.cu", "p.flipped ? p.taps - 1 - tap : tap", "tap"
    ),
    "the last split is not added": fault(
        "weights.cu",
        "for (int s = 0; s < g.splits; ++s) sum",
        "for (int s = 0; s < g.splits - (g.splits > 1); ++s) sum",
    ),
    "pooled pixels of odd images": fault(
        "types.cuh",
        "return (int64_t{first} * h + 2 * y",
        "return (int64_t{first} * (h / 2 * 2) + 2 * y",
    ),
    "pooled pixels of odd volumes": fault("types.cuh", "cut(dims > 2 ? d % 2 : 0)", "cut(0)"),
    "half a window of volumes is pooled": fault(
        "types.cuh",
        "for (int slice = 0; slice < slices; ++slice)",
        "for (int slice = 0; slice < 1; ++slice)",
    ),
    "conv3x3: the first slice of images is not the first": fault(
        "conv3x3_product.cuh", "return z > 0 ? 0 : grid.reach;", "return 0;"
    ),
    "conv3x3: the last slice of images is not the last": fault(
        "conv3x3_product.cuh",
        "return z + 1 < grid.d ? grid.slices",
        "return z < grid.d ? grid.slices",
    ),
    "conv3x3: the kernel's slices all meet the same pixels": fault(
        "conv3x3_product.cuh", "      shift += slice_elements;\n", ""
    ),
    "conv3x3: splits begin at the first channels": fault(
        "conv3x3_product.cuh",
        "channel_step -= weight.steps) ++slice;",
        "channel_step = 0) ++slice;",
    ),
    "conv3x3: pixels of sequences are not waited for": fault(
        "conv3x3_product.cuh",
        "ptx::cp_async_wait<kLines ? 0 : 1>();",
        "ptx::cp_async_wait<1>();",
    ),
    "conv3x3: parts of lines are all the first": fault(
        "conv3x3_product.cuh", " + of_image * g.part_columns;", ";"
    ),
    "conv3x3: tiles of several images of one depth": fault(
        "conv3x3_product.cuh",
        "image = g.images.remainder(deep, z) * g.tile_images",
        "image = g.images.remainder(deep, z)",
    ),
    "tap_product: tiles of the first slice meet what is before the image": fault(
        "pixel_product.cuh", "slice < reach ? grid.depth_parts : 0", "0"
    ),
    "tap_product: tiles of the last slice meet what is behind the image": fault(
        "pixel_product.cuh", "slice > reach ? tiles - grid.depth_parts : tiles", "tiles"
    ),
    "tap_product: all slices are the own": fault(
        "pixel_product.cuh", "place.halo_pixel(p, slice - reach)", "place.halo_pixel(p)"
    ),
    "tap_product: warps of a sequence share all pixels": fault(
        "pixel_product.cuh",
        "p0 = share * kPixelStep; p0 < pixels; p0 += kSharing * kPixelStep",
        "p0 = 0; p0 < pixels; p0 += kPixelStep",
    ),
    "slices of packed weights are those of every step": fault(
        "weights.cu", "tap / 9 * p.steps + step;", "tap / 9 + step * (p.taps == 27 ? 3 : 1);"
    ),
    "weights of volumes without their slices": fault(
        "weights.cu", "tap / 9 * p.stride_d + tap / 3 % 3", "tap / 3 % 3"
    ),
    "cut slices keep their gradient": fault(
        "pointwise.cuh",
        " || places.slices.remainder(slice, places.slices.quotient(slice)) >= d) {",
        ") {",
    ),
    "averages of volumes without ReLU are rectified": fault(
        "transition.cu", "act.shift[c]), act.floor)", "act.shift[c]), A(0))"
    ),
    "gradients without ReLU are masked": fault(
        "epilogue.cuh", "kUnpools ? norm.floor : A(0)", "A(0)"
    ),
    "maxima of volumes are those of one slice": fault(
        "pooling.cu", "const int z = 2 * oz + kd - 1;", "const int z = 2 * oz + kd;"
    ),
    "gradients of maxima in other windows' slices": fault(
        "pooling.cu", "oz <= (pz + 1) / 2 && oz", "oz <= pz / 2 && oz"
    ),
}


# Of the loop over a block's layers and what it does at once, seen by whole blocks.
BLOCK_FAULTS: dict[str, Patch] = {
    "all weights are the first": Patch(
        "cuda/weights.cu",
        "const Packing& p = table.one[blockIdx.y];",
        "const Packing& p = table.one[0];",
    ),
    "splits of one weight gradient alone": Patch(
        "cuda/weights.cu",
        "const SplitSums& g = table.one[blockIdx.y].sums;",
        "const SplitSums& g = table.one[0].sums;",
    ),
    "splits are added a layer too late": Patch(
        "block.h",
        "    Device::add_weight_gradients(context);\n  }\n",
        "  }\n  Device::add_weight_gradients(context);\n",
    ),
    "memory is handed out twice": Patch("cuda/kernels.h", "used_ += (bytes", "used_ = (bytes"),
    "exchanged sums are ignored": Patch("block.h", "upper && !block.norm2_sums", "upper"),
    "own sums in place of exchanged ones": Patch(
        "block.h", "        if (block.norm2_sums)\n", "        if (false)\n"
    ),
    "the next norm is made of a frozen one": Patch(
        "block.h", " || block.norm(half).frozen)\n      known", ")\n      known"
    ),
    "a bottleneck that is there is made again": Patch("block.h", "- block.held;", ";"),
    "gradients of features without a bottleneck replace others": Patch(
        "block.h", "layer.grad_conv2, true);", "layer.grad_conv2, false);"
    ),
    "gradients of features without a bottleneck are not added": Patch(
        "cuda/epilogue.cuh", "(kInto == Into::kNormGradient && accumulate)", "false"
    ),
    "norms without a bottleneck leave the deferred sums": Patch(
        "block.h", "features_needed, layer.norm2.frozen, norm2", "features_needed, true, norm2"
    ),
    "norms without a bottleneck are a layer's next but one": Patch(
        "block.h", "empty(next) ? next + 1 : next;", "empty(next) ? next + 2 : next;"
    ),
}
