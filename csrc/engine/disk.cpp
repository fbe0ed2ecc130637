#include "engine/disk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

#include "parallel.h"

namespace fallow {
namespace {

// Read at once, and by how many threads: where one thread read 1.5 to 2.7 GB/s of 4 MB pieces, four
// read 1.9 to 2.1 of 1 MB and do not depend on the file system's own reading ahead.
constexpr uint64_t kPiece = 1 << 20;
constexpr int kReaders = 4;
// Ranges are of a multiple of so many rows: whole panels of them (kPanel).
constexpr size_t kTogether = 64;
constexpr uint8_t kChances = 3;

// Calls use(piece, offset from the extent's start) for parts of at most kPiece bytes.
template <class Use>
void for_pieces(const Extent& extent, const Use& use) {
  for (uint64_t done = 0; done < extent.size; done += kPiece)
    use(Extent{extent.offset + done, std::min(kPiece, extent.size - done)}, done);
}

// Calls read(i, reader) for i in [0, n) in several threads, each of which is a reader of its own number.
// Throws what one of them threw.
template <class Read>
void in_threads(size_t n, const Read& read) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&](size_t reader) {
    for (size_t i; (i = next++) < n;) {
      try {
        read(i, reader);
      } catch (const DiskError& e) {
        const std::lock_guard lock(mutex);
        error = e.what();
        next = n;
      }
    }
  };
  std::vector<std::thread> readers;
  try {
    for (size_t i = 1; i < std::min<size_t>(n, kReaders); ++i) readers.emplace_back(work, i);
  } catch (const std::system_error&) {  // the system allows no more: those that there are do it
  }
  work(0);
  for (std::thread& reader : readers) reader.join();
  if (!error.empty()) throw DiskError(error);
}

}  // namespace

FileRows::FileRows(const File& file, uint64_t offset, uint64_t row_bytes, size_t n_rows, size_t room,
                   uint64_t range_bytes)
    : file_(file), offset_(offset), row_bytes_(row_bytes),
      range_rows_(std::max<size_t>(range_bytes / row_bytes / kTogether, 1) * kTogether),
      rows_(room * row_bytes), slot_of_(n_rows, -1), row_in_(room, -1), chances_(room), used_(room),
      sectors_(kReaders * row_room()) {
  rows_.expect(0, room * row_bytes);
  for (size_t first = 0, n; first < room; first += n) {
    n = std::min(range_rows_, room - first);
    std::memcpy(rows_.data() + first * row_bytes, range(first, n), n * row_bytes);
  }
  for (size_t i = 0; i < room; ++i) slot_of_[i] = row_in_[i] = static_cast<int32_t>(i);
  range_.reset();
  reset_stats();
}

Extent FileRows::around(uint64_t first, uint64_t n) const {
  const uint64_t begin = offset_ + first * row_bytes_, sector = begin / kSector * kSector;
  return {sector, begin + n * row_bytes_ - sector};
}

size_t FileRows::free_slot() {
  while (true) {
    const size_t slot = hand_;
    hand_ = (hand_ + 1) % room();
    if (row_in_[slot] < 0) return slot;
    if (used_[slot] == call_) continue;
    if (chances_[slot] > 0) {
      --chances_[slot];
      continue;
    }
    slot_of_[static_cast<size_t>(row_in_[slot])] = -1;
    return slot;
  }
}

void FileRows::fetch(const int32_t* rows, size_t n, int32_t* slots) {
  ++call_;
  to_read_.clear();
  for (size_t i = 0; i < n; ++i) {
    int32_t& slot = slot_of_[static_cast<size_t>(rows[i])];
    if (slot < 0) {
      slot = static_cast<int32_t>(free_slot());
      row_in_[static_cast<size_t>(slot)] = rows[i];
      chances_[static_cast<size_t>(slot)] = 0;
      to_read_.push_back(slot);
    } else if (auto& chances = chances_[static_cast<size_t>(slot)]; chances < kChances) {
      ++chances;
    }
    used_[static_cast<size_t>(slot)] = call_;
    slots[i] = slot;
  }
  wanted_ += n;
  if (to_read_.empty()) return;
  try {
    in_threads(to_read_.size(), [&](size_t i, size_t reader) {
      const auto slot = static_cast<size_t>(to_read_[i]);
      const auto row = static_cast<uint64_t>(row_in_[slot]);
      uint8_t* sectors = sectors_.data() + reader * row_room();
      file_.read(around(row, 1), sectors);
      std::memcpy(rows_.data() + slot * row_bytes_,
                  sectors + (offset_ + row * row_bytes_) % kSector, row_bytes_);
    });
    file_.check_unchanged();
  } catch (const DiskError&) {
    for (const int32_t slot : to_read_) {
      int32_t& row = row_in_[static_cast<size_t>(slot)];
      slot_of_[static_cast<size_t>(row)] = -1;
      row = -1;
    }
    throw;
  }
  missing_ += to_read_.size();
  for (const int32_t slot : to_read_)
    bytes_read_ += around(static_cast<uint64_t>(row_in_[static_cast<size_t>(slot)]), 1).room();
}

const uint8_t* FileRows::range(size_t first, size_t n) {
  if (!range_) range_ = std::make_unique<Pages>(range_rows_ * row_bytes_ + 2 * kSector);
  const Extent all = around(first, n);
  std::vector<Extent> pieces;
  for_pieces(all, [&](const Extent& piece, uint64_t) { pieces.push_back(piece); });
  in_threads(pieces.size(), [&](size_t i, size_t) {
    file_.read(pieces[i], range_->data() + (pieces[i].offset - all.offset));
  });
  file_.check_unchanged();
  bytes_read_ += all.size;
  return range_->data() + (offset_ + first * row_bytes_) % kSector;
}

void load(const File& file, const std::vector<Extent>& extents, Pages& image) {
  for (size_t i = 0, next; i < extents.size(); i = next) {
    uint64_t end = extents[i].offset + extents[i].room();
    for (next = i + 1; next < extents.size() && extents[next].offset == end; ++next)
      end += extents[next].room();
    image.expect(extents[i].offset, end - extents[i].offset);
  }
  std::vector<Extent> pieces;
  for (const Extent& extent : extents)
    for_pieces(extent, [&](const Extent& piece, uint64_t) { pieces.push_back(piece); });
  in_threads(pieces.size(),
             [&](size_t i, size_t) { file.read(pieces[i], image.data() + pieces[i].offset); });
}

Streamer::Streamer(const File& file, std::vector<std::vector<Extent>> units, size_t n_slots)
    : file_(file), slots_(n_slots) {
  uint64_t largest = 0;
  for (const auto& extents : units) {
    uint64_t at = 0;
    std::vector<Piece> pieces;
    for (const Extent& extent : extents) {
      for_pieces(extent, [&](const Extent& piece, uint64_t done) {
        pieces.push_back({piece, at + done});
      });
      at += extent.room();
    }
    units_.push_back(std::move(pieces));
    largest = std::max(largest, at);
  }
  for (Slot& slot : slots_) {
    slot.pages = std::make_unique<Pages>(largest);
    slot.pages->expect(0, largest);
  }
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].left = units_[i % units_.size()].size();
  start_threads(readers_, kReaders, [this](int) { work(); }, [this] { end(); });
}

Streamer::~Streamer() { end(); }

void Streamer::end() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  readable_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

// Every reader takes the next piece as long as its unit has a slot: the slot of unit n is free when
// unit n - n_slots is done with.
void Streamer::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    readable_.wait(lock, [&] {
      return stop_ || (error_.empty() && reading_ < oldest_ + slots_.size());
    });
    if (stop_) return;
    const std::vector<Piece>& unit = units_[reading_ % units_.size()];
    Slot& slot = slots_[reading_ % slots_.size()];
    const Piece piece = unit[piece_];
    if (++piece_ == unit.size()) {
      piece_ = 0;
      ++reading_;
    }
    ++in_flight_;
    lock.unlock();
    std::string error;
    try {
      file_.read(piece.from, slot.pages->data() + piece.at);
    } catch (const DiskError& e) {
      error = e.what();
    }
    lock.lock();
    --in_flight_;
    if (!error.empty()) error_ = error;
    bytes_read_ += piece.from.size;
    --slot.left;
    ready_.notify_all();
  }
}

const uint8_t* Streamer::wait(size_t unit) {
  std::unique_lock lock(mutex_);
  // What failed while reading ahead is tried once more.
  if (!error_.empty() || next_ % units_.size() != unit)
    start_at(lock, (next_ / units_.size() + 1) * units_.size() + unit);
  Slot& slot = slots_[next_ % slots_.size()];
  ++waits_;
  // A unit that no reader has begun yet still counts all its pieces.
  if (slot.left == 0 && reading_ > next_) {
    ++in_time_;
  } else {
    ready_.wait(lock, [&] { return !error_.empty() || (slot.left == 0 && reading_ > next_); });
  }
  if (!error_.empty()) throw DiskError(error_);
  file_.check_unchanged();
  ++next_;
  return slot.pages->data();
}

void Streamer::done() {
  {
    const std::lock_guard lock(mutex_);
    Slot& slot = slots_[oldest_ % slots_.size()];
    slot.left = units_[(oldest_ + slots_.size()) % units_.size()].size();
    ++oldest_;
  }
  readable_.notify_all();
}

// Forgets what was read ahead and begins with this unit.
void Streamer::start_at(std::unique_lock<std::mutex>& lock, uint64_t sequence) {
  reading_ = oldest_ + slots_.size();  // nobody takes another piece
  ready_.wait(lock, [&] { return in_flight_ == 0; });
  next_ = oldest_ = reading_ = sequence;
  piece_ = 0;
  error_.clear();
  for (size_t i = 0; i < slots_.size(); ++i)
    slots_[(sequence + i) % slots_.size()].left = units_[(sequence + i) % units_.size()].size();
  readable_.notify_all();
}

void Streamer::reset_stats() {
  const std::lock_guard lock(mutex_);
  bytes_read_ = waits_ = in_time_ = 0;
}

ExpertCache::ExpertCache(const File& file, std::vector<std::vector<Extent>> experts,
                         size_t n_per_layer, size_t n_slots)
    : file_(file), experts_(std::move(experts)),
      half_life_(kHalfLife * static_cast<double>(experts_.size() / n_per_layer)),
      heat_(experts_.size(), -std::numeric_limits<double>::infinity()), slot_of_(experts_.size(), -1),
      expert_in_(n_slots, -1), used_(n_slots), left_(n_slots), fresh_(n_slots), awaited_(n_slots),
      failed_(n_slots) {
  for (const auto& extents : experts_) {
    uint64_t room = 0;
    for (const Extent& extent : extents) room += extent.room();
    slot_bytes_ = std::max(slot_bytes_, room);
  }
  slots_ = std::make_unique<Pages>(n_slots * slot_bytes_);
  slots_->expect(0, n_slots * slot_bytes_);
  start_threads(readers_, kReaders, [this](int) { work(); }, [this] { end(); });
}

ExpertCache::~ExpertCache() { end(); }

void ExpertCache::end() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  readable_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

// A slot that is free, or else that of the coldest expert which this call does not want; -1: all others are
// being read.
int64_t ExpertCache::coldest_slot() const {
  int64_t found = -1;
  double coldest = std::numeric_limits<double>::infinity();
  for (size_t slot = 0; slot < room(); ++slot) {
    if (left_[slot] > 0) continue;
    if (expert_in_[slot] < 0) return static_cast<int64_t>(slot);
    const double heat = heat_[static_cast<size_t>(expert_in_[slot])];
    if (used_[slot] == call_ || (found >= 0 && heat >= coldest)) continue;
    coldest = heat;
    found = static_cast<int64_t>(slot);
  }
  return found;
}

void ExpertCache::read_into(size_t slot, size_t expert) {
  if (expert_in_[slot] >= 0) slot_of_[static_cast<size_t>(expert_in_[slot])] = -1;
  slot_of_[expert] = static_cast<int64_t>(slot);
  expert_in_[slot] = static_cast<int64_t>(expert);
  used_[slot] = 0;
  fresh_[slot] = 1;
  awaited_[slot] = failed_[slot] = 0;
  uint64_t at = slot * slot_bytes_;
  for (const Extent& extent : experts_[expert]) {
    for_pieces(extent, [&](const Extent& piece, uint64_t done) {
      queue_.push_back({slot, piece, at + done});
      ++left_[slot];
    });
    at += extent.room();
  }
}

// Reads no more of what a slot was to hold. Pieces on their way still come, so that it is not free yet.
void ExpertCache::drop(size_t slot) {
  left_[slot] -= std::erase_if(queue_, [&](const Piece& piece) { return piece.slot == slot; });
  if (expert_in_[slot] >= 0) slot_of_[static_cast<size_t>(expert_in_[slot])] = -1;
  expert_in_[slot] = -1;
}

void ExpertCache::want(const size_t* experts, const size_t* uses, size_t n) {
  std::unique_lock lock(mutex_);
  ++call_;
  wanted_slots_.clear();
  was_there_.clear();
  for (size_t i = 0; i < n; ++i) {
    double& heat = heat_[experts[i]];
    const double use = static_cast<double>(call_) / half_life_ + std::log2(static_cast<double>(uses[i]));
    heat = std::max(heat, use) + std::log2(1 + std::exp2(-std::fabs(heat - use)));
    const int64_t slot = slot_of_[experts[i]];
    if (slot < 0) continue;
    if (failed_[static_cast<size_t>(slot)]) drop(static_cast<size_t>(slot));
    else used_[static_cast<size_t>(slot)] = call_;  // must not leave for the others
  }
  while (true) {
    const auto vain = std::find_if(queue_.begin(), queue_.end(),
                                   [&](const Piece& piece) { return used_[piece.slot] != call_; });
    if (vain == queue_.end()) break;
    drop(vain->slot);
  }
  for (size_t i = 0; i < n; ++i) {
    if (slot_of_[experts[i]] < 0) {
      int64_t slot = -1;
      ready_.wait(lock, [&] { return (slot = coldest_slot()) >= 0; });
      read_into(static_cast<size_t>(slot), experts[i]);
    }
    const auto slot = static_cast<size_t>(slot_of_[experts[i]]);
    used_[slot] = call_;
    missing_ += fresh_[slot];
    fresh_[slot] = 0;
    wanted_slots_.push_back(slot);
    was_there_.push_back(left_[slot] == 0);
  }
  wanted_ += n;
  readable_.notify_all();
}

void ExpertCache::foresee(const size_t* experts, size_t n) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    if (slot_of_[experts[i]] >= 0) continue;
    const int64_t slot = coldest_slot();
    if (slot < 0) break;
    read_into(static_cast<size_t>(slot), experts[i]);
  }
  readable_.notify_all();
}

void ExpertCache::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    readable_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    const Piece piece = queue_.front();
    queue_.pop_front();
    std::string error;
    lock.unlock();
    try {
      file_.read(piece.from, slots_->data() + piece.at);
    } catch (const DiskError& e) {
      error = e.what();
    }
    lock.lock();
    if (!error.empty()) {
      error_ = error;
      failed_[piece.slot] = 1;
    }
    bytes_read_ += piece.from.size;
    if (--left_[piece.slot] == 0) ready_.notify_all();
  }
}

const uint8_t* ExpertCache::wait(size_t i) {
  std::unique_lock lock(mutex_);
  const size_t slot = wanted_slots_[i];
  if (!awaited_[slot]) {
    awaited_[slot] = 1;
    in_time_ += left_[slot] == 0;
  }
  ready_.wait(lock, [&] { return left_[slot] == 0; });
  return failed_[slot] ? nullptr : slots_->data() + slot * slot_bytes_;
}

void ExpertCache::check() {
  const std::lock_guard lock(mutex_);
  if (std::any_of(wanted_slots_.begin(), wanted_slots_.end(), [&](size_t slot) { return failed_[slot] != 0; }))
    throw DiskError(error_);
  file_.check_unchanged();
}

}  // namespace fallow
