// The engine as Python sees it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <tuple>

#include "bindings.h"
#include "engine/engine.h"
#include "parallel.h"
#include "platform/mapping.h"

using namespace nb::literals;

namespace fallow {
namespace {

// The engine with the file it runs, which is mapped, or of which some parts are in memory and others come
// from the disk when they are needed.
class BoundEngine {
 public:
  // The mapping must outlive the engine. With `copy` the weights are read into memory of huge pages, which
  // few of a page cache's are, and laid out in tiles, which takes some tenths of a second per GB. Rows of
  // embed_tokens_per_layer, of which a token needs one, stay in the file all the same.
  BoundEngine(const Mapping& mapping, const std::string& kernels, int n_threads, uint32_t context,
              size_t slots, bool copy)
      : mapping_(&mapping), image_(copy ? std::make_unique<Pages>(mapping.size() + kSector) : nullptr),
        kernels_(kernels_of(kernels)) {
    model_ = read_packed(mapping.data(), mapping.size());
    if (copy) {
      const Matrix rows = model_.embed_tokens_per_layer;
      {
        nb::gil_scoped_release release;
        fallow::load(mapping.file(), all_but(rows), *image_);
      }
      model_ = read_packed(image_->data(), mapping.size());
      model_.embed_tokens_per_layer = rows;
    }
    start(n_threads, context, slots);
  }

  // The first header_bytes of the file are its header; load() reads the weights.
  BoundEngine(nb::bytes path, uint64_t header_bytes, const std::string& kernels, int n_threads,
              uint32_t context, size_t slots)
      : file_(std::make_unique<File>(path.c_str(), true)), image_(std::make_unique<Pages>(file_->size())),
        kernels_(kernels_of(kernels)) {
    if (header_bytes > file_->size()) throw nb::value_error("the header is longer than the file");
    fallow::load(*file_, {{0, header_bytes}}, *image_);
    model_ = read_packed(image_->data(), file_->size());
    image_->forget(0, header_bytes);
    start(n_threads, context, slots);
  }

  // The threads of an engine do not exist in a process that was forked from its own: there nothing
  // waits for them, and what they used is left where it is.
  ~BoundEngine() {
    if (process_id() == process_) return;
    engine_.release();
    streamer_.release();
    cache_.release();
    for (auto& rows : file_rows_) rows.release();
    file_.release();
    image_.release();
  }

  // Reads parts (offset, bytes) of the file into memory.
  void load(const std::vector<std::pair<uint64_t, uint64_t>>& parts) {
    if (!file_) throw nb::value_error("this engine's file is mapped");
    if (is_laid_out_) throw nb::value_error("the weights are laid out already");
    std::vector<Extent> extents;
    for (const auto& [offset, size] : parts) extents.push_back(extent(offset, size));
    nb::gil_scoped_release release;
    fallow::load(*file_, extents, *image_);
  }

  // The embedding, or the head, or one that is both, stays in the file, from `offset` on, but for `room`
  // rows; all of them come in ranges of that many bytes.
  void rows_from_file(bool embedding, bool head, uint64_t offset, size_t room,
                      uint64_t range_bytes) {
    const Matrix& w = embedding ? model_.embed_tokens : model_.lm_head;
    extent(offset, w.bytes());
    if (!(embedding || head) || room == 0 || room > w.rows || (head && model_.lm_head.rows != w.rows))
      throw nb::value_error("no rows, or no room for them");
    file_rows_.push_back(
        std::make_unique<FileRows>(*file_, offset, w.row_bytes, w.rows, room, range_bytes));
    FileRows* rows = file_rows_.back().get();
    if (embedding) engine_->set_embedding(rows);
    if (head) engine_->set_head(rows);
    is_head_on_disk_ |= head;
  }

  // The same of embed_tokens_per_layer.
  void rows_per_layer_from_file(uint64_t offset, size_t room, uint64_t range_bytes) {
    const Matrix& w = model_.embed_tokens_per_layer;
    if (room == 0 || room > w.rows) throw nb::value_error("no rows, or no room for them");
    extent(offset, w.bytes());
    file_rows_.push_back(std::make_unique<FileRows>(*file_, offset, w.row_bytes, w.rows, room, range_bytes));
    engine_->set_embedding_per_layer(file_rows_.back().get());
  }

  // (layer, [(matrix, offset, bytes)]), layers ascending
  using PyUnit = std::pair<size_t, std::vector<std::tuple<std::string, uint64_t, uint64_t>>>;

  // What is not in memory, and in how many slots of the largest unit's size it passes through.
  void stream(const std::vector<PyUnit>& list, size_t n_slots) {
    if (!file_ || list.empty() || n_slots == 0) throw nb::value_error("nothing to stream");
    if (is_laid_out_) throw nb::value_error("the weights are laid out already");
    std::vector<std::vector<Extent>> units;
    std::vector<StreamedLayer> layers(model_.layers.size());
    for (const auto& [layer, parts] : list) {
      if (layer >= layers.size() || !layers[layer].places.empty() || parts.empty())
        throw nb::value_error("no such layer");
      StreamedLayer& streamed = layers[layer];
      streamed = {units.size(), {}};
      uint64_t at = 0;
      units.emplace_back();
      for (const auto& [matrix, offset, size] : parts) {
        Layer& l = model_.layers[layer];
        Matrix& m = matrix == "gate_proj" ? l.gate_proj : matrix == "up_proj" ? l.up_proj
                                                                              : l.down_proj_t;
        streamed.places.emplace_back(&m.data, at);
        streamed_.insert(&m);
        units.back().push_back(extent(offset, size));
        at += units.back().back().room();
      }
    }
    streamer_ = std::make_unique<Streamer>(*file_, std::move(units), n_slots);
    engine_->set_stream(streamer_.get(), std::move(layers));
  }

  // Experts stay in the file, but for as many as are in memory at once.
  void cache_experts(size_t n_slots) {
    const Config& c = model_.config;
    if (!file_ || c.n_experts == 0) throw nb::value_error("there are no experts in a file");
    if (n_slots < c.n_experts_used) throw nb::value_error("less room than a token's experts take");
    if (is_laid_out_) throw nb::value_error("the weights are laid out already");
    std::vector<std::vector<Extent>> experts;
    for (const Layer& layer : model_.layers)
      for (size_t e = 0; e < c.n_experts; ++e) {
        experts.emplace_back();
        for (const Matrix* w : {&layer.experts[e].gate_proj, &layer.experts[e].up_proj, &layer.experts[e].down_proj_t})
          experts.back().push_back(extent(static_cast<uint64_t>(w->data - image_->data()), w->bytes()));
      }
    cache_ = std::make_unique<ExpertCache>(*file_, std::move(experts), c.n_experts, n_slots);
    engine_->set_experts(cache_.get());
  }

  void forward(Indices tokens, size_t slot, uint32_t position, bool all, bool dense, bool exact,
               bool record, WritableRows logits) {
    const size_t n = tokens.size();
    check_text(n, slot, position);
    check_pass(tokens, logits, all ? n : 1, model_.config.vocab_size);
    nb::gil_scoped_release release;
    asked_ = std::chrono::steady_clock::now();
    engine_->forward(tokens.data(), n, slot, position, all, dense, exact, record, logits.data());
    if (mapping_) mapping_->check();
  }

  // hidden (n, hidden_size)
  void hidden_states(Indices tokens, size_t slot, uint32_t position, WritableRows hidden) {
    const size_t n = tokens.size();
    check_text(n, slot, position);
    check_pass(tokens, hidden, n, model_.config.hidden_size);
    nb::gil_scoped_release release;
    asked_ = std::chrono::steady_clock::now();
    engine_->hidden_states(tokens.data(), n, slot, position, hidden.data());
    if (mapping_) mapping_->check();
  }

  // places: (slot, position) of each token
  void forward_together(Indices tokens, const std::vector<std::pair<size_t, uint32_t>>& places, bool dense,
                        bool record, WritableRows logits) {
    const size_t n = tokens.size();
    if (n == 0 || n > engine_->most_together() || places.size() != n)
      throw nb::value_error("no tokens, more than are read together, or not a place for each");
    std::vector<Place> found;
    std::set<size_t> slots;
    for (const auto& [slot, position] : places) {
      check_place(slot, position);
      if (position == engine_->context()) throw nb::value_error("the context has no room");
      if (!slots.insert(slot).second) throw nb::value_error("two tokens of one slot");
      found.push_back({slot, position});
    }
    check_pass(tokens, logits, n, model_.config.vocab_size);
    nb::gil_scoped_release release;
    asked_ = std::chrono::steady_clock::now();
    engine_->forward_together(tokens.data(), found.data(), n, dense, record, logits.data());
    if (mapping_) mapping_->check();
  }

  // (layer, tap, how, value, weight or None)
  using PyCut = std::tuple<size_t, size_t, size_t, double, std::optional<ConstFloats>>;

  void set_cuts(const std::vector<PyCut>& list) {
    std::vector<LayerCuts> cuts(list.empty() ? 0 : model_.layers.size());
    for (const auto& [layer, tap, how, value, weight] : list) {
      const bool of_ffn = tap >= kGateInput && tap <= kFfnOut, of_experts = tap == kRouter;
      const bool of_neurons = tap >= kGatePre && tap <= kInter;
      const bool is_there = model_.config.n_experts > 0 ? !of_ffn || of_neurons : !of_experts;
      if (layer >= cuts.size() || tap >= kTaps || how > kLastBy || !is_there) throw nb::value_error("no such cut");
      Cut& cut = cuts[layer][tap];
      cut.by = static_cast<Cut::By>(how);
      cut.value = value;
      if (!weight) continue;
      if (weight->size() != model_.width_of(layer, static_cast<Tap>(tap)))
        throw nb::value_error("a cut's weight has the wrong size");
      cut.weight.assign(weight->data(), weight->data() + weight->size());
    }
    nb::gil_scoped_release release;
    try {
      engine_->set_cuts(std::move(cuts));
      lay_out();
    } catch (...) {  // dense, which works with every layout
      engine_->set_cuts({});
      throw;
    }
  }

  void set_shortlist(float nats, size_t most) {
    nb::gil_scoped_release release;
    try {
      engine_->set_shortlist(nats, most);
      lay_out();
    } catch (...) {
      engine_->set_shortlist(0, 0);
      throw;
    }
  }

  nb::dict stats() const {
    const Statistics& found = engine_->statistics();
    const Timing& t = found.timing;
    nb::dict result;
    result["tokens"] = found.tokens;
    result["bytes_read"] = found.bytes_read();
    result["active"] = found.active;
    result["predicted"] = found.predicted;
    result["expert_uses"] = found.expert_uses;
    nb::dict seconds;
    seconds["attention_proj"] = t.attention_proj;
    seconds["attention"] = t.attention;
    seconds["ffn"] = t.ffn;
    seconds["select"] = t.select;
    seconds["head"] = t.head;
    seconds["other"] = t.other;
    seconds["disk"] = t.disk;
    result["seconds"] = seconds;
    uint64_t bytes = streamer_ ? streamer_->bytes_read() : 0, wanted = 0, missing = 0;
    if (cache_) bytes += cache_->bytes_read();
    for (const auto& rows : file_rows_) {
      bytes += rows->bytes_read();
      wanted += rows->wanted();
      missing += rows->missing();
    }
    nb::dict disk;
    disk["bytes"] = bytes;
    disk["rows"] = wanted;
    disk["missing_rows"] = missing;
    disk["experts"] = cache_ ? cache_->wanted() : 0;
    disk["missing_experts"] = cache_ ? cache_->missing() : 0;
    disk["waits"] = (streamer_ ? streamer_->waits() : 0) + (cache_ ? cache_->missing() : 0);
    disk["in_time"] = (streamer_ ? streamer_->in_time() : 0) + (cache_ ? cache_->in_time() : 0);
    result["disk"] = disk;
    return result;
  }

  void reset_stats() {
    engine_->reset_stats();
    if (streamer_) streamer_->reset_stats();
    if (cache_) cache_->reset_stats();
    for (const auto& rows : file_rows_) rows->reset_stats();
  }

  std::vector<float> down_norm(size_t layer) const {
    const float* values = model_.layers.at(layer).down_norm;
    if (!values) throw nb::value_error("the file has no norms of down_proj");
    return {values, values + model_.width_of(layer, kInter)};
  }

  // Of each layer, with all its experts.
  std::vector<uint64_t> neurons() const {
    std::vector<uint64_t> found;
    for (const Layer& layer : model_.layers) found.push_back(model_.config.neurons(layer.intermediate_size));
    return found;
  }

  size_t width_of(size_t layer, size_t tap) const {
    if (layer >= model_.layers.size() || tap >= kTaps) throw nb::value_error("no such layer or tap");
    return model_.width_of(layer, static_cast<Tap>(tap));
  }

  // (tokens, layers, neurons of the widest layer / 8 rounded up)
  nb::bytes active_neurons() const {
    const std::vector<uint8_t>& bits = engine_->active_neurons().bits();
    return nb::bytes(bits.data(), bits.size());
  }

  const Packed& model() const { return model_; }
  Engine& engine() { return *engine_; }
  const char* kernels() const { return kernels_.name; }

 private:
  void check_place(size_t slot, uint32_t position) const {
    if (slot >= engine_->slots()) throw nb::value_error("the engine has no such slot");
    if (position > engine_->held(slot)) throw nb::value_error("the cache does not hold so many tokens");
  }

  // n more tokens of a slot that holds `position`.
  void check_text(size_t n, size_t slot, uint32_t position) const {
    check_place(slot, position);
    if (n == 0 || n > engine_->context() - position)
      throw nb::value_error("no tokens, or more than the context has room for");
  }

  void check_pass(const Indices& tokens, const WritableRows& result, size_t rows, size_t width) const {
    for (size_t i = 0; i < tokens.size(); ++i)
      if (tokens.data()[i] < 0 ||
          static_cast<uint32_t>(tokens.data()[i]) >= model_.config.vocab_size)
        throw nb::value_error("a token id is outside the vocabulary");
    if (result.shape(0) != rows || result.shape(1) != width)
      throw nb::value_error("logits or hidden states have the wrong shape");
    if (process_id() != process_) throw nb::value_error("this engine was made before a fork");
  }

  void start(int n_threads, uint32_t context, size_t slots) {
    if (n_threads < 1 || n_threads > 1024) throw nb::value_error("threads must be 1 to 1024");
    if (context < 1 || context > model_.config.context_length)
      throw nb::value_error("context must be 1 to the model's own");
    if (slots < 1 || slots > 1024) throw nb::value_error("slots must be 1 to 1024");
    // Of a mixture of experts a block reads nearly all, however small it is.
    const bool is_small = file_ && model_.config.n_experts == 0;
    engine_ = std::make_unique<Engine>(model_, kernels_, n_threads, context,
                                       is_small ? Engine::kSmallBlock : Engine::kBlock, slots);
    engine_->set_pause([this] { answer_signals(); });
  }

  // Weights in memory of our own lie in tiles, but for those of which the plan leaves out some rows. The
  // embedding does where it is the head.
  void lay_out() {
    if (!image_) return;
    is_laid_out_ = true;
    struct Wanted {
      Matrix* w;
      Layout layout;
    };
    std::vector<Wanted> wanted;
    for (size_t l = 0; l < model_.layers.size(); ++l) {
      Layer& layer = model_.layers[l];
      for (Matrix* w : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.per_layer_input_gate,
                        &layer.per_layer_projection})
        wanted.push_back({w, Layout::kDwordTiles});
      wanted.push_back({&layer.gate_proj, engine_->predicts(l) ? Layout::kRows : Layout::kDwordTiles});
      const bool dense = !engine_->leaves_out_neurons(l);
      const bool whole_up = !model_.config.gated || !engine_->chooses_by_gate(l);
      for (Expert& e : layer.experts) {
        const bool is_shared = (&e - layer.experts.data()) >= model_.config.n_experts;
        if (cache_ && !is_shared) continue;
        wanted.push_back({&e.gate_proj, Layout::kDwordTiles});
        wanted.push_back({&e.up_proj, whole_up || is_shared ? Layout::kDwordTiles : Layout::kRows});
        wanted.push_back({&e.down_proj_t, dense || is_shared ? Layout::kByteTiles : Layout::kRows});
      }
      wanted.push_back({&layer.up_proj, whole_up ? Layout::kDwordTiles : Layout::kRows});
      wanted.push_back({&layer.down_proj_t, dense ? Layout::kByteTiles : Layout::kRows});
    }
    wanted.push_back({&model_.per_layer_model_projection, Layout::kDwordTiles});
    if (!is_head_on_disk_)
      wanted.push_back({&model_.lm_head, engine_->has_shortlist() ? Layout::kRows : Layout::kDwordTiles});
    std::erase_if(wanted, [&](const Wanted& wish) {
      const Matrix& w = *wish.w;
      if (!w.data || w.layout == wish.layout || streamed_.contains(&w)) return true;
      return wish.layout != Layout::kRows && !has_tiles(kernels_, wish.layout, w.type, w.rows, w.row_bytes);
    });
    parallel_ranges(wanted.size(), engine_->threads(), [&](size_t begin, size_t end, int) {
      for (size_t i = begin; i < end; ++i) {
        auto& [w, layout] = wanted[i];
        uint8_t* data = image_->data() + (w->data - image_->data());
        if (w->layout != Layout::kRows) to_rows(w->layout, w->type, data, w->rows, w->row_bytes);
        w->layout = Layout::kRows;
        if (layout != Layout::kRows) to_tiles(layout, w->type, data, w->rows, w->row_bytes);
        w->layout = layout;
      }
    });
    if (model_.embed_tokens.data == model_.lm_head.data) model_.embed_tokens.layout = model_.lm_head.layout;
  }

  // Lets Python act on Ctrl-C within a long pass.
  void answer_signals() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(100)) return;
    asked_ = now;
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }

  // The mapped file without the sectors that a matrix fills.
  std::vector<Extent> all_but(const Matrix& w) const {
    const uint64_t size = mapping_->size();
    const auto begin = w.data ? static_cast<uint64_t>(w.data - mapping_->data()) : size;
    const uint64_t first = (begin + kSector - 1) / kSector * kSector, last = (begin + w.bytes()) / kSector * kSector;
    if (first >= last) return {{0, size}};
    std::vector<Extent> parts{{0, first}};
    if (last < size) parts.push_back({last, size - last});
    return parts;
  }

  // A part of the file that is not mapped.
  Extent extent(uint64_t offset, uint64_t size) const {
    if (!file_ || offset % kSector != 0 || size == 0 || offset > file_->size() ||
        size > file_->size() - offset)
      throw nb::value_error("no such part of the file");
    return {offset, size};
  }

  const int64_t process_ = process_id();
  std::chrono::steady_clock::time_point asked_;  // Python for its signals
  // The mapped file, perhaps with its copy, or, in this order since later ones read from earlier ones, these.
  const Mapping* mapping_ = nullptr;
  std::unique_ptr<File> file_;
  std::unique_ptr<Pages> image_;
  Packed model_;
  const Kernels& kernels_;
  std::vector<std::unique_ptr<FileRows>> file_rows_;
  std::unique_ptr<Streamer> streamer_;
  std::unique_ptr<ExpertCache> cache_;
  std::set<const Matrix*> streamed_;
  bool is_laid_out_ = false, is_head_on_disk_ = false;
  std::unique_ptr<Engine> engine_;
};

}  // namespace

void bind_engine(nb::module_& m) {
  nb::list taps;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "gate_pre", "gate_act", "up", "inter", "down_proj", "ffn_out", "router"})
    taps.append(name);
  m.attr("TAPS") = taps;
  m.attr("FEW") = kFew;

  nb::class_<Mapping>(m, "Mapping")
      .def("__init__", [](Mapping* self, nb::bytes path) { new (self) Mapping(path.c_str()); },
           "path"_a, "path: bytes, as the operating system has them. Raises DiskError.")
      .def_prop_ro("data",
                   [](const Mapping& mapping) {
                     return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(
                         mapping.data(), {mapping.size()}, nb::find(mapping));
                   })
      .def("forget", &Mapping::forget, "Lets go of what was read; it is read again when it is used.")
      .def("check", &Mapping::check,
           "Raises DiskError if the file was cut or written to, or could not be read.");

  nb::class_<BoundEngine>(m, "Engine")
      .def(nb::init<const Mapping&, const std::string&, int, uint32_t, size_t, bool>(), nb::keep_alive<1, 2>(),
           "mapping"_a, "kernels"_a, "n_threads"_a, "context"_a, "slots"_a, "copy"_a)
      .def(nb::init<nb::bytes, uint64_t, const std::string&, int, uint32_t, size_t>(), "path"_a,
           "header_bytes"_a, "kernels"_a, "n_threads"_a, "context"_a, "slots"_a)
      .def("load", &BoundEngine::load, "parts"_a)
      .def("rows_from_file", &BoundEngine::rows_from_file, "embedding"_a, "head"_a, "offset"_a,
           "room"_a, "range_bytes"_a)
      .def("rows_per_layer_from_file", &BoundEngine::rows_per_layer_from_file, "offset"_a, "room"_a,
           "range_bytes"_a)
      .def("stream", &BoundEngine::stream, "units"_a, "n_slots"_a)
      .def("cache_experts", &BoundEngine::cache_experts, "n_slots"_a)
      .def("forward", &BoundEngine::forward, "tokens"_a, "slot"_a, "position"_a, "all"_a, "dense"_a,
           "exact"_a, "record"_a, "logits"_a)
      .def("hidden_states", &BoundEngine::hidden_states, "tokens"_a, "slot"_a, "position"_a, "hidden"_a)
      .def("forward_together", &BoundEngine::forward_together, "tokens"_a, "places"_a, "dense"_a,
           "record"_a, "logits"_a)
      .def("set_cuts", &BoundEngine::set_cuts, "cuts"_a)
      .def("set_skips_zeros", [](BoundEngine& e, bool skips) { e.engine().set_skips_zeros(skips); }, "skips"_a)
      .def("stats", &BoundEngine::stats)
      .def("reset_stats", &BoundEngine::reset_stats)
      .def("active_neurons", &BoundEngine::active_neurons)
      .def("set_shortlist", &BoundEngine::set_shortlist, "nats"_a, "most"_a)
      .def("down_norm", &BoundEngine::down_norm, "layer"_a)
      .def_prop_ro("context", [](BoundEngine& e) { return e.engine().context(); })
      .def_prop_ro("kernels", &BoundEngine::kernels)
      .def_prop_ro("n_layers", [](const BoundEngine& e) { return e.model().config.n_layers; })
      .def_prop_ro("vocab_size", [](const BoundEngine& e) { return e.model().config.vocab_size; })
      .def_prop_ro("hidden_size", [](BoundEngine& e) { return e.model().config.hidden_size; })
      .def("width_of", &BoundEngine::width_of, "layer"_a, "tap"_a)
      .def_prop_ro("neurons", &BoundEngine::neurons);
}

}  // namespace fallow
