// A back end of ggml for the feed-forward blocks of llama.cpp's models: `fallow llama build` makes
// libggml-fallow.so of it, which llama.cpp loads when it starts. docs/how-to/llama-cpp.md is for users.
//
// The registered device is an accelerator whose buffers are not host memory: llama.cpp hands it every
// ffn_gate, ffn_up and ffn_down whole (set_tensor), since it supports products with those alone. Back ends
// are of a second device, which is not registered and whose own buffers are the CPU's: so activations stay
// where they are, and llama.cpp's scheduler gives every FFN to it as one piece of the graph: two products,
// their gated unit, a product. Those are computed together; where something else is among them (an adapter,
// a callback), one by one.
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/activation.h"
#include "engine/disk.h"
#include "engine/ffn.h"
#include "formats/dequant.h"
#include "formats/gguf.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "platform/mapping.h"

namespace fallow {
namespace {

constexpr size_t kBlock = 256;       // tokens that go through an FFN at once
constexpr size_t kSmallBlock = 64;   // the same under a memory budget
constexpr size_t kAlignment = 64;
constexpr size_t kSlots = 2;         // for layers that come from the disk
constexpr uint64_t kMachines = 2;    // of a context whose prompts have a number of threads of their own

// Of the OpenMP team that ggml's own threads are: with as many threads it is the same.
void in_team(int n, void (*call)(const void*, int), const void* context) {
#pragma omp parallel num_threads(n)
  for (int worker = omp_get_thread_num(); worker < n; worker += omp_get_num_threads()) call(context, worker);
}

void say(const std::string& text) { std::fprintf(stderr, "fallow: %s\n", text.c_str()); }

// ---- The file beside a model ----

struct MappedFile {
  explicit MappedFile(const std::string& path)
      : path(path), mapping(path), ffns(read_ffn_file(mapping.data(), mapping.size())) {}
  std::string path;
  Mapping mapping;
  FfnFile ffns;
  uint64_t budget = 0;  // bytes that FFNs may take; 0: no limit

  std::vector<const Matrix*> matrices(size_t l) const {
    const Layer& layer = ffns.layers[l];
    std::vector<const Matrix*> found;
    for (const Matrix* w : {&layer.gate_proj, &layer.up_proj, &layer.down_proj_t})
      if (w->data) found.push_back(w);
    return found;
  }
  Extent extent(const Matrix& w) const { return {static_cast<uint64_t>(w.data - mapping.data()), w.bytes()}; }
  uint64_t room(size_t l) const {
    uint64_t room = 0;
    for (const Matrix* w : matrices(l)) room += extent(*w).room();
    return room;
  }
};

// What a Machine takes, at most: of a block's tokens their floats, halves, bytes and scales as products read
// and write them, each thread's panels (Products, Ffn), and weights of two cuts per layer.
uint64_t scratch_bytes(size_t block, size_t widest, int n_threads, size_t n_layers) {
  return (28 * block + 1024 * static_cast<uint64_t>(n_threads) + 8 * n_layers) * widest;
}

// Layers that are read from the disk for every pass, so that all else fits into the file's budget: as few as
// can be, far apart. Throws if it is too small for any.
std::vector<bool> streamed_layers(const MappedFile& file, int n_threads) {
  const size_t n = file.ffns.layers.size();
  std::vector<bool> streamed(n);
  if (file.budget == 0) return streamed;
  const Matrix& up = file.ffns.layers[0].up_proj;
  const uint64_t scratch = kMachines * scratch_bytes(kSmallBlock, std::max(up.rows, up.cols), n_threads, n);
  uint64_t needed = 0;
  for (size_t count = 0; count <= n; ++count) {
    uint64_t resident = 0, slot = 0;
    for (size_t l = 0; l < n; ++l) {
      streamed[l] = (l + 1) * count / n > l * count / n;
      (streamed[l] ? slot = std::max(slot, file.room(l)) : resident += file.room(l));
    }
    needed = resident + kSlots * slot + scratch;
    if (needed <= file.budget) return streamed;
  }
  const auto in_mb = [](uint64_t bytes) { return std::to_string(bytes / 1000000); };
  throw PackedError("FALLOW_MEMORY of " + in_mb(file.budget) + " MB is too small for these FFNs on " +
                    std::to_string(n_threads) + " threads; give " + in_mb(needed + 999999) + "MB or more");
}

// Bytes of a size such as 800MB or 1.5GiB; 0 for anything else, and for a small number without a unit.
uint64_t parse_size(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  std::string unit(end);
  std::transform(unit.begin(), unit.end(), unit.begin(), [](unsigned char c) { return std::toupper(c); });
  const std::map<std::string, double> units = {{"", 1},     {"B", 1},        {"KB", 1e3},     {"MB", 1e6},
                                               {"GB", 1e9}, {"KIB", 1 << 10}, {"MIB", 1 << 20}, {"GIB", 1 << 30}};
  const auto found = units.find(unit);
  if (end == text.c_str() || found == units.end() || (unit.empty() && value < 1e6)) return 0;
  const double bytes = value * found->second;
  return bytes >= 1 && bytes < 1e18 ? static_cast<uint64_t>(bytes) : 0;
}

// Whether a file that is no GGUF is one of fallow's plans (docs/plan.md), whose header begins it.
bool is_plan(const char* path) {
  char start[4096] = {};
  if (FILE* file = std::fopen(path, "rb")) {
    const size_t n = std::fread(start, 1, sizeof start, file);
    std::fclose(file);
    return std::string_view(start, n).find("fallow_plan") != std::string_view::npos;
  }
  return false;
}

std::mutex file_mutex;
std::shared_ptr<MappedFile> file_of_next_models;

// Says why not, or nothing. Without a path: no file. `memory`: a size, or nothing.
std::string use_file(const char* path, const char* memory) {
  std::shared_ptr<MappedFile> file;
  try {
    if (path && *path) file = std::make_shared<MappedFile>(path);
    if (memory && *memory) {
      const uint64_t budget = parse_size(memory);
      if (budget == 0)
        return std::string("FALLOW_MEMORY '") + memory + "' is not a size; give one such as 800MB or 1.5GB";
      if (!file || !file->ffns.layers[0].up_proj.data)
        return "FALLOW_MEMORY needs a packed model as FALLOW_PLAN, of fallow pack or optimize: FFN weights are "
               "read from it";
      file->budget = budget;
      (void)streamed_layers(*file, 1);
    }
  } catch (const GgufError& error) {
    if (!is_plan(path)) return std::string(path) + ": " + error.what();
    return std::string(path) + " is a plan alone; pack the model with it (fallow pack --plan), or make a file of it "
                               "with: fallow llama pack MODEL.gguf --plan THIS -o FILE";
  } catch (const std::exception& error) {
    return std::string(path) + ": " + error.what();
  }
  const std::lock_guard lock(file_mutex);
  file_of_next_models = std::move(file);
  return {};
}

// ---- Weights ----

enum Part { kGateProj, kUpProj, kDownProj, kParts };

struct Weight {
  size_t layer = 0;
  Part part = kParts;  // an adapter's: it lies where the weight does that it changes
  Matrix w;
  uint8_t* data = nullptr;  // that w reads, where it is not the file's
  uint64_t fingerprint = 0;
  bool is_left = false;     // in the file, until finish() says where it lies
};

// blk.N.ffn_gate.weight and so on.
std::optional<std::pair<size_t, Part>> place_of(const char* name) {
  static const char* const kNames[kParts] = {"gate", "up", "down"};
  unsigned layer = 0;
  char part[8] = {};
  int end = 0;
  if (std::sscanf(name, "blk.%u.ffn_%7[a-z].weight%n", &layer, part, &end) != 2 || end == 0 || name[end]) return {};
  for (int p = 0; p < kParts; ++p)
    if (std::strcmp(part, kNames[p]) == 0) return {{layer, static_cast<Part>(p)}};
  return {};
}

// Tokens of each layer and, summed over them, active neurons: the last layer reads what is asked for alone.
struct Totals {
  uint64_t bytes = 0;
  std::vector<uint64_t> tokens, active;

  void add(const Statistics& found, const std::vector<uint64_t>& read) {
    bytes += found.bytes_read();
    tokens.resize(std::max(tokens.size(), read.size()));
    active.resize(tokens.size());
    for (size_t l = 0; l < read.size(); ++l) {
      tokens[l] += read[l];
      active[l] += found.active[l];
    }
  }
};

class Machine;

// The FFNs of one of llama.cpp's models: a buffer of ggml's.
class Model {
 public:
  explicit Model(size_t size) : pages_(size), kernels_(*usable_kernels()[0]) {
    const std::lock_guard lock(file_mutex);
    file_ = file_of_next_models;
  }

  uint8_t* base() const { return pages_.data(); }
  const Kernels& kernels() const { return kernels_; }

  Weight* add(const char* name, Matrix w) {
    weights_.push_back(std::make_unique<Weight>());
    Weight& weight = *weights_.back();
    weight.w = w;
    weight.data = const_cast<uint8_t*>(w.data);
    if (const auto place = place_of(name)) {
      std::tie(weight.layer, weight.part) = *place;
      if (weight.layer >= layers_.size()) layers_.resize(weight.layer + 1);
      layers_[weight.layer][weight.part] = &weight;
    }
    return &weight;
  }

  // Takes the bytes of a weight, or leaves them where they are if the file has them by neuron.
  void set(Weight& weight, const void* data, size_t offset, size_t size) {
    const bool whole = offset == 0 && size == weight.w.bytes();
    if (whole && file_) {
      weight.fingerprint = fingerprint(static_cast<const uint8_t*>(data), size);
      weight.is_left = (weight.part == kDownProj || file_->budget > 0) && is_as_in_file(weight);
      if (weight.is_left) return;
    }
    std::memcpy(weight.data + offset, data, size);
  }

  // The bytes that were set; false if they were left where they are.
  bool get(const Weight& weight, void* data, size_t offset, size_t size) const {
    if (weight.is_left && weight.part == kDownProj) return false;
    const uint8_t* from = weight.is_left ? in_file(weight).data : weight.data;
    std::vector<uint8_t> rows(from, from + weight.w.bytes());
    if (weight.w.layout != Layout::kRows) to_rows(weight.w.layout, weight.w.type, rows.data(), weight.w.rows, weight.w.row_bytes);
    std::memcpy(data, rows.data() + offset, size);
    return true;
  }

  // Before the first pass: which layers run as the file says, and where weights lie. `zeros`: whether
  // activations make neurons exactly zero. Throws.
  void finish(int n_threads, bool zeros) {
    const std::lock_guard lock(mutex_);
    if (is_finished_) return;
    const FfnFile* ffns = file_ ? &file_->ffns : nullptr;
    size_t known = 0, there = 0;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const auto& parts = layers_[l];
      if (!parts[kUpProj] && !parts[kDownProj]) continue;
      ++there;
      if (!ffns || l >= ffns->layers.size()) continue;
      known += parts[kDownProj] && is_as_in_file(*parts[kDownProj]) && parts[kUpProj] && is_as_in_file(*parts[kUpProj]) &&
               (parts[kGateProj] ? is_as_in_file(*parts[kGateProj]) : ffns->fingerprints[l * kParts + kGateProj] == 0);
    }
    if (file_ && there > 0 && known < there)
      say("the file was made for another model (" + std::to_string(known) + " of " + std::to_string(there) +
          " FFNs are the same); this one runs dense" +
          (file_->budget > 0 ? ", and without a memory budget" : ""));
    const bool is_known = ffns && there > 0 && known == there;
    if (is_known && !ffns->note.empty()) say(ffns->note);
    follows_plan_ = is_known && !ffns->cuts.empty();
    skips_zeros_ = zeros;
    stream(is_known, n_threads);
    down_t_.assign(layers_.size(), {});
    uint64_t bytes = 0;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Weight* down = layers_[l][kDownProj];
      if (!ffns || !down || !is_as_in_file(*down)) continue;
      down_t_[l] = ffns->layers[l];
      if (!streams(l)) bytes += down_t_[l].down_proj_t.bytes() + kAlignment;
    }
    copied_ = std::make_unique<Pages>(std::max<uint64_t>(bytes, 1));
    weight_bytes_ += bytes;
    std::vector<Copy> copies;
    std::vector<std::pair<Matrix*, Layout>> wanted;
    uint8_t* at = copied_->data();
    for (size_t l = 0; l < layers_.size(); ++l) {
      for (const Weight* w : layers_[l]) {
        if (!w || w->part == kDownProj) continue;
        weight_bytes_ += streams(l) ? 0 : w->w.bytes();
        if (w->is_left && !streams(l)) copies.push_back({w->data, in_file(*w).data, w->w.bytes()});
      }
      if (streams(l)) continue;
      const LayerCuts* cuts = follows_plan_ && l < ffns->cuts.size() ? &ffns->cuts[l] : nullptr;
      const auto any = [&](std::initializer_list<Tap> taps) {
        return cuts && std::any_of(taps.begin(), taps.end(), [&](Tap tap) { return (*cuts)[tap].cuts(); });
      };
      for (Weight* w : layers_[l]) {
        if (!w || (w->part == kDownProj && down_t_[l].down_proj_t.data)) continue;
        const bool rows = w->part == kUpProj && (zeros || any({kGatePre, kGateAct}));
        wanted.push_back({&w->w, rows ? Layout::kRows : Layout::kDwordTiles});
      }
      if (Matrix& down = down_t_[l].down_proj_t; down.data) {
        // Without a gate too: what its activation makes zero, product() leaves out.
        const bool rows = zeros || !layers_[l][kGateProj] ||
                          any({kGateInput, kUpInput, kGatePre, kGateAct, kUp, kInter, kDownInput});
        copies.push_back({at, down.data, down.bytes()});
        down.data = at;
        at += (down.bytes() + kAlignment - 1) / kAlignment * kAlignment;
        wanted.push_back({&down, rows ? Layout::kRows : Layout::kByteTiles});
      }
    }
    ThreadPool pool(n_threads, in_team);
    run(pool, copies.size(), [&](size_t i) { std::memcpy(copies[i].to, copies[i].from, copies[i].bytes); });
    if (file_) file_->mapping.check();
    if (file_ && file_->budget > 0) file_->mapping.forget();
    run(pool, wanted.size(), [&](size_t i) {
      auto [w, layout] = wanted[i];
      if (!has_tiles(kernels_, layout, w->type, w->rows, w->row_bytes)) return;
      to_tiles(layout, w->type, const_cast<uint8_t*>(w->data), w->rows, w->row_bytes);
      w->layout = layout;
    });
    is_finished_ = true;
  }

  // An FFN that runs by neuron: gate_proj, up_proj and down_proj_t with its outliers.
  std::optional<Layer> by_neuron(size_t l) const {
    const auto& parts = layers_[l];
    if (!parts[kGateProj] || !parts[kUpProj] || l >= down_t_.size() || !down_t_[l].down_proj_t.data) return {};
    Layer layer = down_t_[l];
    if (!streams(l)) {
      layer.gate_proj = parts[kGateProj]->w;
      layer.up_proj = parts[kUpProj]->w;
    }
    return layer;
  }

  bool streams(size_t l) const { return l < unit_of_.size() && unit_of_[l] >= 0; }
  // Calls use(layer) with the matrices of a layer that comes from the disk, which are there meanwhile. Throws
  // DiskError.
  template <class Use>
  void with_streamed(size_t l, const Use& use) {
    const std::lock_guard lock(stream_mutex_);
    const uint8_t* at = streamer_->wait(static_cast<size_t>(unit_of_[l]));
    Layer layer = down_t_[l];
    for (Matrix* w : {&layer.gate_proj, &layer.up_proj, &layer.down_proj_t}) {
      if (!w->data) continue;
      const uint64_t room = file_->extent(*w).room();
      w->data = at;
      at += room;
    }
    use(layer);
    streamer_->done();
  }
  bool has_budget() const { return file_ && file_->budget > 0; }
  bool has_down_t(size_t l) const { return down_t_[l].down_proj_t.data != nullptr; }
  const Layer& down_layer(size_t l) const { return down_t_[l]; }
  size_t n_layers() const { return layers_.size(); }
  size_t widest() const {
    size_t widest = 0;
    for (const auto& w : weights_) widest = std::max<size_t>({widest, w->w.rows, w->w.cols});
    return widest;
  }
  // One per layer, or none.
  std::vector<LayerCuts> cuts() const {
    if (!follows_plan_) return {};
    std::vector<LayerCuts> cuts = file_->ffns.cuts;
    cuts.resize(layers_.size());
    return cuts;
  }
  bool skips_zeros() const { return skips_zeros_; }
  bool has_ffns() const { return !layers_.empty(); }

  std::mutex& mutex() { return mutex_; }
  std::vector<Machine*> machines;  // that run it
  Totals finished;                 // of those that do no more
  std::atomic<uint64_t> fused = 0, apart = 0;  // FFNs computed together, and products one by one

  std::string report();

 private:
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    uint64_t bytes;
  };

  template <class Body>
  static void run(ThreadPool& pool, size_t n, const Body& body) {
    std::atomic<size_t> next = 0;
    pool.run([&](int) {
      for (size_t i; (i = next.fetch_add(1)) < n;) body(i);
    });
  }

  // Which layers come from the disk, under a budget for the model that the file is for.
  void stream(bool is_known, int n_threads) {
    if (!has_budget() || !is_known) return;
    const std::vector<bool> streamed = streamed_layers(*file_, n_threads);
    unit_of_.assign(layers_.size(), -1);
    std::vector<std::vector<Extent>> units;
    for (size_t l = 0; l < layers_.size(); ++l) {
      if (!layers_[l][kUpProj] || !streamed[l]) continue;
      unit_of_[l] = static_cast<int64_t>(units.size());
      units.emplace_back();
      for (const Matrix* w : file_->matrices(l)) {
        units.back().push_back(file_->extent(*w));
        if (units.back().back().offset % kSector != 0)
          throw PackedError(file_->path + ": its matrices do not begin at sectors; pack it again");
      }
      slot_bytes_ = std::max(slot_bytes_, file_->room(l));
    }
    if (units.empty()) return;
    disk_ = std::make_unique<File>(file_->path, true);
    streamer_ = std::make_unique<Streamer>(*disk_, std::move(units), kSlots);
  }

  // Of gate_proj and up_proj, which only a packed model has.
  const Matrix& in_file(const Weight& weight) const {
    const Layer& layer = file_->ffns.layers[weight.layer];
    return weight.part == kGateProj ? layer.gate_proj : layer.up_proj;
  }

  bool is_as_in_file(const Weight& weight) const {
    if (!file_ || weight.layer >= file_->ffns.layers.size()) return false;
    if (weight.part != kDownProj && file_->budget > 0 && in_file(weight).type != weight.w.type) return false;
    const Matrix& down_t = file_->ffns.layers[weight.layer].down_proj_t;
    const bool is_down = weight.part == kDownProj;
    return weight.w.rows == (is_down ? down_t.cols : down_t.rows) &&
           weight.w.cols == (is_down ? down_t.rows : down_t.cols) &&
           file_->ffns.fingerprints[weight.layer * kParts + weight.part] == weight.fingerprint;
  }

  Pages pages_;
  const Kernels& kernels_;
  std::shared_ptr<MappedFile> file_;
  std::vector<std::unique_ptr<Weight>> weights_;
  std::vector<std::array<Weight*, kParts>> layers_;
  std::vector<Layer> down_t_;  // of each layer, if the file has it: down_proj_t and outliers
  std::unique_ptr<Pages> copied_;
  std::mutex mutex_;
  bool is_finished_ = false, follows_plan_ = false, skips_zeros_ = false;
  // Under a budget: of each layer its unit of the streamer's, or -1.
  std::vector<int64_t> unit_of_;
  std::unique_ptr<File> disk_;
  std::unique_ptr<Streamer> streamer_;
  std::mutex stream_mutex_;
  uint64_t weight_bytes_ = 0, slot_bytes_ = 0;
};

std::mutex models_mutex;
std::vector<std::shared_ptr<Model>> models;

// ---- Computing ----

std::optional<Act> act_of(const ggml_tensor* node) {
  switch (ggml_get_glu_op(node)) {
    case GGML_GLU_OP_SWIGLU: return Act::kSilu;
    case GGML_GLU_OP_GEGLU: return Act::kGeluTanh;
    case GGML_GLU_OP_GEGLU_ERF: return Act::kGelu;
    case GGML_GLU_OP_REGLU: return Act::kRelu;
    default: return {};
  }
}

// What one of llama.cpp's contexts needs to run a model with some threads.
class Machine {
 public:
  Machine(std::shared_ptr<Model> model, int n_threads)
      : model_(std::move(model)), block_(model_->has_budget() ? kSmallBlock : kBlock),
        run_(model_->kernels(), n_threads, model_->n_layers(), 0, in_team), cuts_(run_, model_->widest()),
        products_(run_, cuts_, block_, model_->widest(), model_->widest()), x_(block_, model_->widest(), run_.kernels),
        tokens_(model_->n_layers()) {
    const std::lock_guard lock(model_->mutex());
    model_->machines.push_back(this);
  }
  ~Machine() {
    const std::lock_guard lock(model_->mutex());
    std::erase(model_->machines, this);
    count_in(model_->finished);
  }

  void count_in(Totals& totals) const { totals.add(run_.statistics, tokens_); }
  uint64_t scratch() const { return scratch_bytes(block_, model_->widest(), run_.pool.size(), model_->n_layers()); }

  // down(act(gate x) * up x). False: it is for others to compute, one product after another.
  bool ffn(const Weight& gate, const Weight& up, const Weight& down, Act act, const ggml_tensor* x,
           ggml_tensor* out) {
    if (!prepare(act)) return false;
    const size_t hidden = gate.w.cols;
    if (up.w.cols != hidden || up.w.rows != gate.w.rows) return false;
    ggml_tensor apart = *x;
    std::vector<float> copy;
    if (ggml_nrows(x) > static_cast<int64_t>(block_) && out->data > x->data &&
        static_cast<char*>(out->data) < static_cast<char*>(x->data) + ggml_nrows(x) * x->nb[1]) {
      // What is read last would be written over by what is computed first.
      copy.resize(static_cast<size_t>(ggml_nrows(x)) * x->nb[1] / sizeof(float));
      std::memcpy(copy.data(), x->data, copy.size() * sizeof(float));
      apart.data = copy.data();
      x = &apart;
    }
    const bool by_neuron = ffn_ && packed_.layers[gate.layer].down_proj_t.data;
    if (!by_neuron && (down.w.cols != gate.w.rows || model_->has_down_t(down.layer))) return false;
    const auto forward = [&] {
      for_blocks(x, [&](size_t t, size_t n) { ffn_->forward(gate.layer, x_, n, row(out, t)); });
    };
    if (!by_neuron) {
      for_blocks(x, [&](size_t t, size_t n) { dense(gate, up, down, n, row(out, t)); });
    } else if (model_->streams(gate.layer)) {
      model_->with_streamed(gate.layer, [&](const Layer& layer) {
        Layer& own = packed_.layers[gate.layer];
        own.gate_proj = layer.gate_proj, own.up_proj = layer.up_proj, own.down_proj_t = layer.down_proj_t;
        forward();
      });
    } else {
      forward();
    }
    tokens_[gate.layer] += static_cast<size_t>(ggml_nrows(x));
    ++model_->fused;
    return true;
  }

  void product(const Weight& weight, const ggml_tensor* x, ggml_tensor* out) {
    if (weight.part == kParts || !model_->streams(weight.layer)) {
      const bool by_neuron = weight.part == kDownProj && model_->has_down_t(weight.layer);
      by_neuron ? down_product(model_->down_layer(weight.layer), x, out) : product(weight.w, x, out);
    } else {
      model_->with_streamed(weight.layer, [&](const Layer& layer) {
        if (weight.part == kDownProj) return down_product(layer, x, out);
        product(weight.part == kGateProj ? layer.gate_proj : layer.up_proj, x, out);
      });
    }
    ++model_->apart;
  }

  void glu(const ggml_tensor* gate, const ggml_tensor* up, Act act, ggml_tensor* out) {
    Config config{};
    config.act = act;
    const auto width = static_cast<size_t>(gate->ne[0]);
    run_.for_tokens(static_cast<size_t>(ggml_nrows(gate)), [&](size_t t, int) {
      glu(run_.kernels, config, width, row(gate, t), row(up, t), row(out, t));
    });
  }

 private:
  // y = down(act(gate x) * up x) of a block, from llama.cpp's own rows.
  void dense(const Weight& gate, const Weight& up, const Weight& down, size_t n, float* y) {
    const size_t d_ff = gate.w.rows;
    inter_.resize(2 * block_ * d_ff);
    float *gated = inter_.data(), *upped = gated + block_ * d_ff;
    products_.multiply(0, x_, n, {{gate.w, nullptr, gated, kGateInput}, {up.w, nullptr, upped, kUpInput}});
    glu(packed_.config, n, d_ff, gated, upped, gated);
    set_input(d_ff, n, [&](size_t i) { return gated + i * d_ff; });
    products_.multiply(x_, n, {down.w, nullptr, y, kDownInput});
    run_.statistics.active[gate.layer] += n * d_ff;
  }

  void product(const Matrix& w, const ggml_tensor* x, ggml_tensor* out) {
    for_blocks(x, [&](size_t t, size_t n) { products_.multiply(x_, n, {w, nullptr, row(out, t), kDownInput}); });
  }

  void down_product(const Layer& layer, const ggml_tensor* x, ggml_tensor* out) {
    const Matrix& w = layer.down_proj_t;
    for_blocks(x, [&](size_t t, size_t n) {
      float* y = row(out, t);
      if (is_decode(n)) {
        sum_few(w, n, y);
      } else {
        products_.sum_rows(w, n, x_.x.data(), y);
      }
      for (size_t i = 0; i < n; ++i) add_outliers(layer, x_.x.data() + i * x_.width, y + i * w.cols);
    });
  }

  static float* row(const ggml_tensor* x, size_t t) {
    return reinterpret_cast<float*>(static_cast<char*>(x->data) + t * x->nb[1]);
  }

  static void glu(const Kernels& kernels, const Config& config, size_t n, const float* gate, const float* up, float* out) {
    if (out != gate) std::copy_n(gate, n, out);
    activate(kernels, config, out, n);
    for (size_t i = 0; i < n; ++i) out[i] *= up[i];
  }
  void glu(const Config& config, size_t tokens, size_t n, const float* gate, const float* up, float* out) {
    run_.for_tokens(tokens, [&](size_t t, int) {
      glu(run_.kernels, config, n, gate + t * n, up + t * n, out + t * n);
    });
  }

  template <class RowOf>
  void set_input(size_t width, size_t n, const RowOf& row_of) {
    x_.width = width;
    run_.for_tokens(n, [&](size_t t, int) { std::copy_n(row_of(t), width, x_.x.data() + t * width); });
    products_.prepare(x_, n);
  }

  template <class Body>
  void for_blocks(const ggml_tensor* x, const Body& body) {
    const auto all = static_cast<size_t>(ggml_nrows(x));
    for (size_t t = 0, n; t < all; t += n) {
      n = std::min(block_, all - t);
      set_input(static_cast<size_t>(x->ne[0]), n, [&](size_t i) { return row(x, t + i); });
      body(t, n);
    }
  }

  // The FFNs that run by neuron, once it is known what activates them.
  bool prepare(Act act) {
    if (is_prepared_) return act == packed_.config.act;
    is_prepared_ = true;
    packed_.config.act = act;
    packed_.config.gated = true;
    for (size_t l = 0; l < model_->n_layers(); ++l) {
      packed_.layers.push_back(model_->by_neuron(l).value_or(Layer{}));
      const Matrix& gate = packed_.layers.back().gate_proj;
      if (!gate.data) continue;
      packed_.layers.back().intermediate_size = static_cast<uint32_t>(gate.rows);
      uint32_t &hidden = packed_.config.hidden_size, &d_ff = packed_.config.intermediate_size;
      if (d_ff == 0) hidden = static_cast<uint32_t>(gate.cols), d_ff = static_cast<uint32_t>(gate.rows);
      if (hidden != gate.cols || d_ff != gate.rows) packed_.layers.back() = Layer{};
    }
    if (packed_.config.intermediate_size > 0) {
      cuts_.set(model_->cuts());
      cuts_.set_skips_zeros(packed_.config.has_zeros() && model_->skips_zeros(), false);
      ffn_.emplace(run_, cuts_, products_, packed_, kBlock);
    }
    return true;
  }

  // y = x W_down^T by rows of down_proj_t, those of zeros left out.
  void sum_few(const Matrix& w, size_t n, float* y) {
    partial_.resize(run_.n_threads() * w.cols);
    list_.resize(w.rows);
    coefficients_.resize(w.rows);
    for (size_t t = 0; t < n; ++t, y += w.cols) {
      const float* x = x_.x.data() + t * w.rows;
      const bool tiled = w.layout != Layout::kRows;
      size_t count = w.rows;
      if (!tiled) {
        count = run_.kernels.list_nonzero(x, 0, w.rows, list_.data());
        for (size_t i = 0; i < count; ++i) coefficients_[i] = x[list_[i]];
      }
      run_.pool.run([&](int worker) {
        float* own = partial_.data() + static_cast<size_t>(worker) * w.cols;
        std::fill_n(own, w.cols, 0.0f);
        if (tiled) {
          const Share s = share_of_rows(count, worker, run_.pool.size());
          products_.axpy(w, s.begin, s.end - s.begin, x + s.begin, w.rows, 1, own, w.cols, worker);
        } else {
          const Share s = share_of(count, worker, run_.pool.size());
          products_.axpy(w, list_.data() + s.begin, 0, s.end - s.begin, coefficients_.data() + s.begin, own, worker);
        }
      });
      std::copy_n(partial_.begin(), w.cols, y);
      for (size_t i = 1; i < run_.n_threads(); ++i) add_to(y, partial_.data() + i * w.cols, w.cols);
    }
  }

  void add_outliers(const Layer& layer, const float* x, float* y) {
    const Matrix& w = layer.outliers;
    if (w.rows == 0) return;
    std::vector<float> own(w.rows);
    for (size_t i = 0; i < w.rows; ++i) own[i] = x[layer.outlier_neurons[i]];
    run_.kernels.axpy_rows[w.type](w.data, w.row_bytes, nullptr, 0, w.rows, w.cols, own.data(), y);
  }

  std::shared_ptr<Model> model_;
  const size_t block_;  // tokens
  Runtime run_;
  Cuts cuts_;
  Products products_;
  Input x_;
  std::vector<uint64_t> tokens_;  // of each layer, computed whole
  bool is_prepared_ = false;
  Packed packed_{};
  std::optional<Ffn> ffn_;
  std::vector<float> inter_, partial_, coefficients_;
  std::vector<int32_t> list_;
};

std::string Model::report() {
  const std::lock_guard lock(mutex_);
  Totals all = finished;
  uint64_t held = weight_bytes_ + (streamer_ ? kSlots * slot_bytes_ : 0);
  for (const Machine* machine : machines) {
    machine->count_in(all);
    held += machine->scratch();
  }
  const auto list = [](const std::vector<uint64_t>& values) {
    std::string text;
    for (const uint64_t value : values) text += (text.empty() ? "[" : ", ") + std::to_string(value);
    return text.empty() ? "[]" : text + "]";
  };
  std::vector<uint64_t> neurons;
  for (const auto& parts : layers_) neurons.push_back(parts[kUpProj] ? parts[kUpProj]->w.rows : 0);
  return std::string("{\"kernels\": \"") + kernels_.name + "\", \"plan\": " + (follows_plan_ ? "true" : "false") +
         ", \"bytes\": " + std::to_string(all.bytes) + ", \"held\": " + std::to_string(held) +
         ", \"disk_bytes\": " + std::to_string(streamer_ ? streamer_->bytes_read() : 0) +
         ", \"fused\": " + std::to_string(fused) +
         ", \"apart\": " + std::to_string(apart) + ", \"tokens\": " + list(all.tokens) +
         ", \"active\": " + list(all.active) + ", \"neurons\": " + list(neurons) + "}";
}

// ---- ggml's interface ----

const char* name_of_type(ggml_backend_buffer_type_t) { return "fallow"; }
ggml_backend_buffer_type_t weights_type();
ggml_backend_dev_t device();
ggml_backend_dev_t computing_device();

bool is_ours(const ggml_tensor* tensor) {
  return tensor && tensor->buffer && tensor->buffer->buft == weights_type();
}
Weight* weight_of(const ggml_tensor* tensor) {
  return is_ours(tensor) ? static_cast<Weight*>(tensor->extra) : nullptr;
}
std::shared_ptr<Model>& model_of(ggml_backend_buffer_t buffer) {
  return *static_cast<std::shared_ptr<Model>*>(buffer->context);
}

const ggml_backend_buffer_i kBuffer = {
    .free_buffer =
        [](ggml_backend_buffer_t buffer) {
          auto& model = model_of(buffer);
          if (std::getenv("FALLOW_STATISTICS") && model->has_ffns()) say(model->report());
          {
            const std::lock_guard lock(models_mutex);
            std::erase(models, model);
          }
          delete &model;
        },
    .get_base =
        [](ggml_backend_buffer_t buffer) -> void* {
          return model_of(buffer)->base();
        },
    .init_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor* tensor) -> ggml_status {
      if (tensor->view_src) return GGML_STATUS_SUCCESS;
      const Matrix w{static_cast<const uint8_t*>(tensor->data), static_cast<uint32_t>(tensor->type),
                     static_cast<uint64_t>(tensor->ne[1]), static_cast<uint64_t>(tensor->ne[0]), tensor->nb[1]};
      tensor->extra = model_of(buffer)->add(tensor->name, w);
      return GGML_STATUS_SUCCESS;
    },
    .memset_tensor = [](ggml_backend_buffer_t, ggml_tensor* tensor, uint8_t value, size_t offset,
                        size_t size) { std::memset(static_cast<char*>(tensor->data) + offset, value, size); },
    .set_tensor =
        [](ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data, size_t offset, size_t size) {
          Weight* weight = weight_of(tensor);
          if (weight) {
            model_of(buffer)->set(*weight, data, offset, size);
          } else {
            std::memcpy(static_cast<char*>(tensor->data) + offset, data, size);
          }
        },
    .get_tensor =
        [](ggml_backend_buffer_t buffer, const ggml_tensor* tensor, void* data, size_t offset, size_t size) {
          const Weight* weight = weight_of(tensor);
          if (!weight) {
            std::memcpy(data, static_cast<const char*>(tensor->data) + offset, size);
          } else if (!model_of(buffer)->get(*weight, data, offset, size)) {
            GGML_ABORT("fallow: %s cannot be read back: it is in the plan's file, by neuron\n", tensor->name);
          }
        },
    .set_tensor_2d = nullptr,
    .get_tensor_2d = nullptr,
    .cpy_tensor = nullptr,
    .clear = [](ggml_backend_buffer_t, uint8_t) {},  // pages are zero
    .reset = nullptr,
};

ggml_backend_buffer_type_t weights_type() {
  static ggml_backend_buffer_type type = {
      .iface = {
          .get_name = name_of_type,
          .alloc_buffer = [](ggml_backend_buffer_type_t own, size_t size) -> ggml_backend_buffer_t {
            try {
              auto model = std::make_shared<Model>(size);
              {
                const std::lock_guard lock(models_mutex);
                models.push_back(model);
              }
              return ggml_backend_buffer_init(own, kBuffer, new std::shared_ptr<Model>(model), size);
            } catch (const std::exception& error) {
              say(error.what());
              return nullptr;
            }
          },
          .get_alignment = [](ggml_backend_buffer_type_t) { return kAlignment; },
          .get_max_size = nullptr,
          .get_alloc_size = nullptr,
          .is_host = [](ggml_backend_buffer_type_t) { return false; },
      },
      .device = device(),
      .context = nullptr,
  };
  return &type;
}

// Rows of floats, a step apart.
bool is_plain(const ggml_tensor* x) {
  const bool is_matrix = x->ne[2] == 1 && x->ne[3] == 1;
  return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && (is_matrix || ggml_is_contiguous(x));
}

// Nodes at which nothing is computed.
bool is_nothing(const ggml_tensor* op) {
  return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_PERMUTE ||
         op->op == GGML_OP_TRANSPOSE;
}

bool supports(const ggml_tensor* op) {
  if (is_nothing(op)) return true;
  if (op->op == GGML_OP_MUL_MAT) {
    const ggml_tensor *w = op->src[0], *x = op->src[1];
    if (!is_ours(w) || w->view_src || !is_plain(x) || !is_plain(op)) return false;
    // What llama.cpp asks for before it has allocated anything is taken by name, an adapter's where it lies.
    if (w->buffer->size == 0 && !place_of(w->name)) return false;
    const auto type = static_cast<uint32_t>(w->type);
    const bool is_float = type == kF32 || type == kF16 || type == kBF16;
    return type < kGgmlTypes && usable_kernels()[0]->gemv_rows[type] &&
           (is_float || (w->ne[0] % 32 == 0 && w->ne[1] % 32 == 0)) && w->ne[2] == 1 && w->ne[3] == 1;
  }
  if (op->op == GGML_OP_GLU) {
    const auto is_product = [](const ggml_tensor* t) { return t && t->op == GGML_OP_MUL_MAT && is_ours(t->src[0]); };
    return is_product(op->src[0]) && is_product(op->src[1]) && is_plain(op) && act_of(op).has_value();
  }
  return false;
}

struct Backend {
  int n_threads = 1;
  std::map<std::pair<const Model*, int>, std::unique_ptr<Machine>> machines;

  Machine& machine(const ggml_tensor* weight, bool zeros = false) {
    const auto model = model_of(weight->buffer);
    auto& found = machines[{model.get(), n_threads}];
    if (!found) {
      model->finish(n_threads, zeros);
      found = std::make_unique<Machine>(model, n_threads);
    }
    return *found;
  }

  // The four nodes of an FFN, from the i-th on.
  bool ffn(ggml_cgraph* graph, int i) {
    if (i + 3 >= ggml_graph_n_nodes(graph)) return false;
    ggml_tensor *first = ggml_graph_node(graph, i), *second = ggml_graph_node(graph, i + 1),
                *glu = ggml_graph_node(graph, i + 2), *last = ggml_graph_node(graph, i + 3);
    if (first->op != GGML_OP_MUL_MAT || second->op != GGML_OP_MUL_MAT || glu->op != GGML_OP_GLU ||
        last->op != GGML_OP_MUL_MAT)
      return false;
    const bool up_first = glu->src[1] == first;
    ggml_tensor *gate = up_first ? second : first, *up = up_first ? first : second;
    const Weight *wg = weight_of(gate->src[0]), *wu = weight_of(up->src[0]), *wd = weight_of(last->src[0]);
    const bool is_whole = wg && wu && wd && wg->part == kGateProj && wu->part == kUpProj && wd->part == kDownProj &&
                          wg->layer == wu->layer && wg->layer == wd->layer && gate->src[1] == up->src[1] &&
                          glu->src[0] == gate && glu->src[1] == up && last->src[1] == glu;
    if (!is_whole || last->nb[1] != last->ne[0] * sizeof(float)) return false;
    // Nobody else reads what is then not written: an adapter of down_proj reads `glu`.
    for (int k = i; k < i + 3; ++k)
      if (!ggml_node_has_n_uses(graph, k, 1)) return false;
    const Act act = *act_of(glu);
    return machine(last->src[0], act == Act::kRelu).ffn(*wg, *wu, *wd, act, gate->src[1], last);
  }

  ggml_status compute(ggml_cgraph* graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
      ggml_tensor* node = ggml_graph_node(graph, i);
      if (ggml_is_empty(node) || is_nothing(node) || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) continue;
      switch (node->op) {
        case GGML_OP_MUL_MAT:
          if (ffn(graph, i)) {
            i += 3;
          } else {
            machine(node->src[0]).product(*weight_of(node->src[0]), node->src[1], node);
          }
          continue;
        case GGML_OP_GLU:
          machine(node->src[0]->src[0]).glu(node->src[0], node->src[1], *act_of(node), node);
          continue;
        default: return GGML_STATUS_FAILED;
      }
    }
    return GGML_STATUS_SUCCESS;
  }
};

ggml_backend_t make_backend(ggml_backend_dev_t, const char*) {
  static const ggml_guid kGuid = {0x66, 0x61, 0x6c, 0x6c, 0x6f, 0x77, 0x2d, 0x66,
                                  0x66, 0x6e, 0x2d, 0x73, 0x6b, 0x69, 0x70, 0x31};
  ggml_backend_i own{};
  own.get_name = [](ggml_backend_t) { return "fallow"; };
  own.free = [](ggml_backend_t backend) {
    delete static_cast<Backend*>(backend->context);
    delete backend;
  };
  own.graph_compute = [](ggml_backend_t backend, ggml_cgraph* graph) {
    try {
      return static_cast<Backend*>(backend->context)->compute(graph);
    } catch (const std::exception& error) {  // memory, or the plan's file
      say(error.what());
      return GGML_STATUS_ALLOC_FAILED;
    }
  };
  return new ggml_backend{const_cast<ggml_guid*>(&kGuid), own, computing_device(), new Backend};
}

ggml_backend_reg_t registry();

ggml_backend_device make_device(bool registered) {
  ggml_backend_device_i own{};
  own.get_name = [](ggml_backend_dev_t) { return "fallow"; };
  own.get_description = [](ggml_backend_dev_t) { return "feed-forward blocks by fallow"; };
  own.get_memory = [](ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; };
  own.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; };
  own.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props* props) {
    *props = {};
    props->name = dev->iface.get_name(dev);
    props->description = dev->iface.get_description(dev);
    props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
  };
  own.init_backend = make_backend;
  own.get_buffer_type = registered ? [](ggml_backend_dev_t) { return weights_type(); }
                                   : [](ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); };
  own.supports_op = [](ggml_backend_dev_t, const ggml_tensor* op) { return supports(op); };
  own.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == weights_type() || ggml_backend_buft_is_host(type);
  };
  return {own, registry(), nullptr};
}

ggml_backend_dev_t device() {
  static ggml_backend_device own = make_device(true);
  return &own;
}
ggml_backend_dev_t computing_device() {
  static ggml_backend_device own = make_device(false);
  return &own;
}

ggml_backend_reg_t registry() {
  static ggml_backend_reg own = {
      .api_version = GGML_BACKEND_API_VERSION,
      .iface = {
          .get_name = [](ggml_backend_reg_t) { return "fallow"; },
          .get_device_count = [](ggml_backend_reg_t) { return size_t{1}; },
          .get_device = [](ggml_backend_reg_t, size_t) { return device(); },
          .get_proc_address = [](ggml_backend_reg_t, const char* name) -> void* {
            if (std::strcmp(name, "ggml_backend_set_n_threads") != 0) return nullptr;
            const ggml_backend_set_n_threads_t set = [](ggml_backend_t backend, int n) {
              static_cast<Backend*>(backend->context)->n_threads = std::max(1, n);
            };
            return reinterpret_cast<void*>(set);
          },
      },
      .context = nullptr,
  };
  return &own;
}

}  // namespace
}  // namespace fallow

extern "C" {

// Of ggml_object, which its headers do not show.
constexpr size_t kObject = 32;

// Null, which llama.cpp takes for "not here", where structures differ from those this was built with.
__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  const std::string here = std::string(ggml_version()) + " " + ggml_commit();
  if (here != FALLOW_GGML_VERSION || ggml_tensor_overhead() != kObject + sizeof(ggml_tensor)) {
    fallow::say(std::string("built for ggml ") + FALLOW_GGML_VERSION + ", but this is " + here +
                "; run: fallow llama build");
    return nullptr;
  }
  const std::string problem = fallow::use_file(std::getenv("FALLOW_PLAN"), std::getenv("FALLOW_MEMORY"));
  if (!problem.empty()) fallow::say(problem + "; models run dense");
  return fallow::registry();
}

// For models loaded from now on, a file of `fallow llama pack` or a packed model, null or "": none; and what
// their FFNs may take in memory, 800MB say, null or "": no limit. Returns null, or why not, until the next call.
__attribute__((visibility("default"))) const char* fallow_use_plan(const char* path, const char* memory) {
  static std::string problem;
  problem = fallow::use_file(path, memory);
  return problem.empty() ? nullptr : problem.c_str();
}

// What was computed for each model that is loaded, as JSON; until the next call.
__attribute__((visibility("default"))) const char* fallow_statistics() {
  thread_local std::string text;
  const std::lock_guard lock(fallow::models_mutex);
  text = "[";
  for (const auto& model : fallow::models)
    if (model->has_ffns()) text += (text.size() > 1 ? ", " : "") + model->report();
  return (text += "]").c_str();
}
}
