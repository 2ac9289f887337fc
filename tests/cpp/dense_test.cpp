// How cuda_dense cuts W into chunks, and when it is chosen, without a GPU.
#include <gtest/gtest.h>

#include "block_sparse/product.h"
#include "cuda/dense/choice.h"
#include "cuda/dense/chunks.h"

namespace block_sparse::cuda::dense_weight {
namespace {

TEST(Chunks, AreBoundedAndCoverEverythingInRowsOf16Bytes) {
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    for (Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (int64_t out : {1, 7, 4096, 14333, 1 << 20}) {
        for (int64_t in : {1, 7, 4091, 4096, 1 << 20}) {
          const ProductDesc desc{product, dtype, Epilogue::none, 64, out, in, {8, 8}, 1};
          const Chunks chunks = chunks_of(desc);
          const bool by_columns = product == Product::grad_input;
          EXPECT_EQ(chunks.lines, by_columns ? in : out);
          EXPECT_GE(chunks.step, 1);
          EXPECT_LE(chunks.step, chunks.lines);
          EXPECT_LE(bytes_of(chunks, dtype), kChunkBytes) << to_string(desc);
          EXPECT_EQ(chunks.rows, by_columns ? out : chunks.step);
          EXPECT_GE(chunks.pitch, by_columns ? chunks.step : in);
          EXPECT_EQ(chunks.pitch * size_of(dtype) % 16, 0);
          if (chunks.step < chunks.lines) {
            EXPECT_GT(2 * bytes_of(chunks, dtype), kChunkBytes / 2) << "too small to be fast";
            if (by_columns) {
              EXPECT_EQ(chunks.step * size_of(dtype) % 16, 0) << "a chunk begins within 16 bytes";
            }
          }
        }
      }
    }
  }
}

TEST(Chunks, ALineThatIsLargerIsAChunk) {
  const int64_t size = int64_t{1} << 27;
  ProductDesc desc{Product::forward, Dtype::bf16, Epilogue::none, 64, 5, size, {8, 8}, 1};
  EXPECT_EQ(chunks_of(desc).step, 1);
  EXPECT_EQ(bytes_of(chunks_of(desc), desc.dtype), 2 * size);
  desc.product = Product::grad_input;
  std::swap(desc.out_features, desc.in_features);
  EXPECT_EQ(chunks_of(desc).step, 5);
  EXPECT_EQ(bytes_of(chunks_of(desc), desc.dtype), 8 * 2 * size);
}

ProductDesc desc_of(Product product, Dtype dtype, int64_t side, double density, int64_t tokens,
                    int64_t out = 14336, int64_t in = 4096) {
  ProductDesc desc{product, dtype, Epilogue::none, tokens, out, in, {side, side}, 0};
  desc.nnz = static_cast<int64_t>(density * static_cast<double>(out / side * (in / side)));
  desc.dense_product = true;
  return desc;
}

// Cases of which one took at most 0.9 of the time of the other on an H100.
TEST(Choice, AgainstTilesIsTheFaster) {
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    const auto is_dense = [&](Dtype dtype, int64_t side, double density, int64_t tokens) {
      return is_fastest(desc_of(product, dtype, side, density, tokens));
    };
    EXPECT_TRUE(is_dense(Dtype::bf16, 8, 0.25, 1));
    EXPECT_TRUE(is_dense(Dtype::bf16, 8, 0.25, 8192));
    EXPECT_TRUE(is_dense(Dtype::bf16, 8, 0.03, 8192));
    EXPECT_FALSE(is_dense(Dtype::bf16, 8, 0.03, 64));
    EXPECT_TRUE(is_dense(Dtype::bf16, 4, 0.25, 256));
    EXPECT_FALSE(is_dense(Dtype::f32, 32, 0.25, 8192));
    EXPECT_FALSE(is_dense(Dtype::f32, 32, 0.5, 2048));
    EXPECT_FALSE(is_dense(Dtype::f32, 16, 0.25, 2048));
    EXPECT_TRUE(is_dense(Dtype::f32, 8, 0.25, 8192));
    EXPECT_FALSE(is_dense(Dtype::f32, 8, 0.05, 1));
    ProductDesc tf32 = desc_of(product, Dtype::f32, 32, 0.25, 1024);
    tf32.tf32 = true;
    EXPECT_TRUE(is_fastest(tf32));
    tf32 = desc_of(product, Dtype::f32, 32, 0.05, 2048);
    tf32.tf32 = true;
    EXPECT_FALSE(is_fastest(tf32));
    EXPECT_TRUE(is_fastest(desc_of(product, Dtype::f64, 32, 0.25, 4096, 4096, 4096)));
    EXPECT_FALSE(is_fastest(desc_of(product, Dtype::f64, 8, 0.1, 256, 4096, 4096)));
    EXPECT_TRUE(is_fastest(desc_of(product, Dtype::bf16, 8, 0.25, 1024, 1024, 1024)));
    // Not measured: where launches are all that takes time.
    EXPECT_FALSE(is_fastest(desc_of(product, Dtype::bf16, 8, 0.25, 64, 256, 256)));
  }
}

TEST(Choice, AKernelLeavesAProductOnlyToALentDenseProductAndNotWhenForced) {
  constexpr Rates kRates{.present = 650, .all = 1480};  // those of strips of 16 x 16
  ProductDesc desc = desc_of(Product::forward, Dtype::bf16, 16, 1, 8192);
  ASSERT_TRUE(why_dense(desc, kRates));
  EXPECT_EQ(*why_dense(desc, kRates), "at density 1 cuda_dense is faster");
  desc.forced = true;
  EXPECT_FALSE(why_dense(desc, kRates));
  desc.forced = desc.dense_product = false;
  EXPECT_FALSE(why_dense(desc, kRates));
  EXPECT_FALSE(why_dense(desc_of(Product::forward, Dtype::bf16, 16, 0.25, 8192), kRates));
  EXPECT_FALSE(why_dense(desc_of(Product::forward, Dtype::bf16, 16, 1, 512), kRates));
}

}  // namespace
}  // namespace block_sparse::cuda::dense_weight
