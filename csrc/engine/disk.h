// Weights that do not fit into memory. Those that stay lie in an image of the file, anonymous memory in
// which every byte has the place that it has in the file, so that packed.h reads it as it reads the
// mapped file. The others pass through a few slots, read ahead in the order in which every pass over
// the model needs them. Nothing goes through the page cache where the file system lets that be.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "platform/file.h"

namespace fallow {

// A matrix that stays in its file: rows of row_bytes each from `offset` on. `room` of those that were
// wanted before are in memory; which one leaves for another is the first, round and round, that was not
// wanted again since its last turn (a clock with several chances).
class FileRows {
 public:
  // Ranges of rows are of `range_bytes` or little more. The first rows are in memory from the start:
  // tokens of low numbers are the frequent ones. Throws DiskError.
  FileRows(const File& file, uint64_t offset, uint64_t row_bytes, size_t n_rows, size_t room,
           uint64_t range_bytes);

  size_t room() const { return row_in_.size(); }
  // Until the next call these rows, at most room(), lie at data() + slots[i] * row_bytes. Throws
  // DiskError.
  void fetch(const int32_t* rows, size_t n, int32_t* slots);
  const uint8_t* data() const { return rows_.data(); }

  // Rows that follow each other, at most range_rows(), valid until the next call. Throws DiskError.
  const uint8_t* range(size_t first, size_t n);
  size_t range_rows() const { return range_rows_; }

  // Since the last reset_stats.
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t wanted() const { return wanted_; }  // rows that fetch was asked for
  uint64_t missing() const { return missing_; }  // of these, what had to be read
  void reset_stats() { bytes_read_ = wanted_ = missing_ = 0; }

 private:
  size_t free_slot();
  // Bytes of the sectors that a row may lie in.
  uint64_t row_room() const { return Extent{0, row_bytes_ + 2 * kSector}.room(); }
  // Whole sectors around some rows.
  Extent around(uint64_t first, uint64_t n) const;

  const File& file_;
  uint64_t offset_, row_bytes_;
  size_t range_rows_;
  Pages rows_;
  std::vector<int32_t> slot_of_;  // of each row of the matrix; -1: it is not in memory
  std::vector<int32_t> row_in_;   // of each slot; -1: none
  std::vector<uint8_t> chances_;  // turns that a slot's row stays
  std::vector<uint64_t> used_;    // the call that wanted it last
  std::vector<int32_t> to_read_;  // slots
  uint64_t call_ = 0;
  size_t hand_ = 0;
  Pages sectors_;  // a row's, for each reader
  std::unique_ptr<Pages> range_;
  uint64_t bytes_read_ = 0, wanted_ = 0, missing_ = 0;
};

// Matrices of a layer's FFN that come through a Streamer, as one unit of it: the places in the model
// that say where they lie, and how far from the unit's beginning they do.
struct StreamedLayer {
  size_t unit = 0;
  std::vector<std::pair<const uint8_t**, uint64_t>> places;  // empty: the layer stays in memory
};

// Reads extents, ascending, to their own places in `image`, with several threads.
void load(const File& file, const std::vector<Extent>& extents, Pages& image);

// Units of extents, read ahead round and round: unit 0, 1, ..., n - 1, 0, ...
class Streamer {
 public:
  Streamer(const File& file, std::vector<std::vector<Extent>> units, size_t n_slots);
  ~Streamer();

  // Waits for a unit and returns where its extents lie, one after the other. The caller asks for
  // unit 0, 1, ... in turn and says when it is done with each; another order starts over there.
  // Throws DiskError.
  const uint8_t* wait(size_t unit);
  void done();

  // Since the last reset_stats.
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t waits() const { return waits_; }    // units asked for
  uint64_t in_time() const { return in_time_; }  // of these, what was there
  void reset_stats();

 private:
  struct Slot {
    std::unique_ptr<Pages> pages;
    size_t left = 0;  // pieces still to be read
  };
  struct Piece {
    Extent from;
    uint64_t at;  // in the slot
  };

  void work();
  void end();  // of the readers
  void start_at(std::unique_lock<std::mutex>& lock, uint64_t sequence);

  const File& file_;
  std::vector<std::vector<Piece>> units_;
  std::vector<Slot> slots_;

  std::mutex mutex_;
  std::condition_variable readable_, ready_;
  // Units are counted on and on: the one that is asked for next, the oldest not done with, and the
  // piece of a unit to read next.
  uint64_t next_ = 0, oldest_ = 0, reading_ = 0;
  size_t piece_ = 0, in_flight_ = 0;
  bool stop_ = false;
  std::string error_;
  uint64_t bytes_read_ = 0, waits_ = 0, in_time_ = 0;
  std::vector<std::thread> readers_;
};

// Experts whose weights are read from the file when tokens choose them. `n_slots` of those that were
// chosen before are in memory. Which one leaves for another is the coldest: every use heats an expert, and
// heat halves in kHalfLife passes (LRFU: Lee et al., IEEE Trans. Computers 50(12), 2001).
class ExpertCache {
 public:
  // Long against the tokens that a cache holds, some three, so that what is used often outlives them; short
  // against a text.
  static constexpr double kHalfLife = 64;

  // Of each expert its extents, which in memory lie one after the other. Experts are numbered through
  // all layers, n_per_layer of each.
  ExpertCache(const File& file, std::vector<std::vector<Extent>> experts, size_t n_per_layer,
              size_t n_slots);
  ~ExpertCache();

  size_t room() const { return expert_in_.size(); }
  // Begins to read those of these n <= room() experts that are not in memory; uses[i] tokens chose the
  // i-th. Others may leave: what an earlier call wanted must have been waited for. What was foreseen in
  // vain is read no further.
  void want(const size_t* experts, const size_t* uses, size_t n);
  // Then reads these n, which may be wanted next.
  void foresee(const size_t* experts, size_t n);
  // Whether the i-th of them was in memory already.
  bool was_there(size_t i) const { return was_there_[i] != 0; }
  // Waits until the i-th of them is in memory, for any thread; null if it cannot be read.
  const uint8_t* wait(size_t i);
  // Throws DiskError if one of them could not be read, or the file has changed. To be called when all
  // were waited for.
  void check();

  // Since the last reset_stats. Of what is foreseen, bytes are read at any time.
  uint64_t bytes_read() const {
    const std::lock_guard lock(mutex_);
    return bytes_read_;
  }
  uint64_t wanted() const { return wanted_; }
  uint64_t missing() const { return missing_; }  // of these, what had to be read, foreseen or not
  uint64_t in_time() const { return in_time_; }  // of these, what was there when it was waited for
  void reset_stats() {
    const std::lock_guard lock(mutex_);
    bytes_read_ = wanted_ = missing_ = in_time_ = 0;
  }

 private:
  struct Piece {
    size_t slot;
    Extent from;
    uint64_t at;  // in the slot
  };

  void work();
  void end();  // of the readers
  int64_t coldest_slot() const;
  void read_into(size_t slot, size_t expert);
  void drop(size_t slot);

  const File& file_;
  std::vector<std::vector<Extent>> experts_;
  double half_life_;  // calls
  uint64_t slot_bytes_ = 0;
  std::unique_ptr<Pages> slots_;
  std::vector<double> heat_;         // of each expert, log2; as if all uses were in the first call
  std::vector<int64_t> slot_of_;     // of each expert; -1: it is not in memory
  std::vector<int64_t> expert_in_;   // of each slot; -1: none
  std::vector<uint64_t> used_;       // of each slot: the call that wanted it last
  std::vector<size_t> wanted_slots_; // of this call
  std::vector<uint8_t> was_there_;   // of this call
  uint64_t call_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable readable_, ready_;
  std::vector<size_t> left_;         // of each slot: pieces still to be read
  std::vector<uint8_t> fresh_;       // of each slot: nobody wanted what is read there yet
  std::vector<uint8_t> awaited_;     // of each slot: whether somebody waited for what is read
  std::vector<uint8_t> failed_;      // of each slot: whether it could not be read
  std::deque<Piece> queue_;
  std::string error_;
  bool stop_ = false;
  uint64_t bytes_read_ = 0, wanted_ = 0, missing_ = 0, in_time_ = 0;
  std::vector<std::thread> readers_;
};

}  // namespace fallow
