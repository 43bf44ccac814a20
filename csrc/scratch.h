// Scratch memory that outlives a call: what one step needed, the next one finds, already faulted in.
//
// A step's scratch is a few bytes for each id of its batch (see occurrences.h). Freed and allocated anew it would be
// mapped and zeroed by the system at every step, at the cost of sorting it. At most kKept blocks stay, the largest ones of
// up to kLargest bytes.

#ifndef EMBAX_CSRC_SCRATCH_H_
#define EMBAX_CSRC_SCRATCH_H_

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace embax {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_(take(bytes)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { give_back(std::move(block_)); }

  char* data() { return block_.bytes.get(); }

 private:
  struct Block {
    std::unique_ptr<char[]> bytes;
    size_t size = 0;
  };
  struct Kept {
    std::mutex mutex;
    std::vector<Block> blocks;  // the smallest first
  };
  static constexpr size_t kKept = 4, kLargest = size_t{256} << 20;

  static Kept& kept() {
    static Kept* const all = new Kept;  // never destroyed: a thread may still be at work when the process ends
    return *all;
  }

  static Block take(size_t bytes) {
#if !defined(__SANITIZE_ADDRESS__)  // there every byte beyond what was asked for is to be seen
    {
      Kept& all = kept();
      const std::lock_guard<std::mutex> lock(all.mutex);
      for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block) {
        if (block->size < bytes) continue;
        Block found = std::move(*block);
        all.blocks.erase(block);
        return found;
      }
    }
#endif
    return {std::unique_ptr<char[]>(new char[bytes]), bytes};
  }

  static void give_back(Block block) {
    if (block.size > kLargest) return;
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    auto place = all.blocks.begin();
    while (place != all.blocks.end() && place->size < block.size) ++place;
    all.blocks.insert(place, std::move(block));
    if (all.blocks.size() > kKept) all.blocks.erase(all.blocks.begin());
  }

  Block block_;
};

}  // namespace embax

#endif  // EMBAX_CSRC_SCRATCH_H_
