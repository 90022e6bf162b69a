#include "text/replacement.h"

#include <cstdlib>
#include <random>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "sinkrt/error.h"

namespace sinkrt {
namespace {

constexpr const char* kHex = "0123456789abcdef";
constexpr const char* kEnd = ".partial";
constexpr size_t kDigits = 8;
constexpr int kAttempts = 16;  // to make a file that no other process takes for a leftover before it is locked

std::string baseName(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

std::string folderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// The file that `path` names once links are followed; the path itself if there is none yet.
std::string followed(const std::string& path) {
  char* const real = ::realpath(path.c_str(), nullptr);
  if (real != nullptr) {
    std::string out(real);
    std::free(real);
    return out;
  }
  std::vector<char> link(4096);
  const ssize_t size = ::readlink(path.c_str(), link.data(), link.size());
  if (size <= 0 || static_cast<size_t>(size) == link.size()) return path;
  const std::string target(link.data(), static_cast<size_t>(size));  // a link to a file that is yet to be made
  return target[0] == '/' ? target : joined(folderOf(path), target);
}

bool isLeftover(const std::string& name, const std::string& start) {
  const std::string end(kEnd);
  if (name.size() != start.size() + kDigits + end.size() || name.compare(0, start.size(), start) != 0) return false;
  if (name.compare(start.size() + kDigits, end.size(), end) != 0) return false;
  return name.find_first_not_of(kHex, start.size()) == start.size() + kDigits;
}

}  // namespace

Replacement::Replacement(const std::string& path) : path_(path), target_(followed(path)) {
  if (baseName(path).empty()) fail(EISDIR);
  struct stat facts{};
  if (::stat(target_.c_str(), &facts) == 0) {
    if (S_ISDIR(facts.st_mode)) fail(EISDIR);
    if (!S_ISREG(facts.st_mode)) fail("a device, pipe or socket, no file");
  } else if (errno != ENOENT) {
    fail(errno);
  }
  removeLeftovers();
  open();
}

Replacement::~Replacement() {
  if (!done_ && !temporary_.empty()) ::unlink(temporary_.c_str());
}

void Replacement::write(const void* data, size_t size) {
  if (std::fwrite(data, 1, size, file_.get()) != size) fail(errno);
}

void Replacement::commit() {
  if (std::fflush(file_.get()) != 0 || ::fsync(::fileno(file_.get())) != 0) fail(errno);
  if (std::rename(temporary_.c_str(), target_.c_str()) != 0) fail(errno);  // while it is locked
  done_ = true;
  if (std::fclose(file_.release()) != 0) fail(errno);
  // Make the new name survive a power cut, where folders can be synced.
  const int folder = ::open(folderOf(target_).c_str(), O_RDONLY | O_CLOEXEC);
  if (folder >= 0) {
    ::fsync(folder);
    ::close(folder);
  }
}

void Replacement::open() {
  std::random_device random;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    temporary_ = joined(folderOf(target_), "." + baseName(target_) + ".");
    for (size_t i = 0; i < kDigits; ++i) temporary_ += kHex[random() & 0xf];
    temporary_ += kEnd;
    const int handle = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (handle < 0) {
      const int reason = errno;
      temporary_.clear();
      fail(reason);
    }
    file_.reset(::fdopen(handle, "wb"));
    if (!file_) {
      const int reason = errno;
      ::close(handle);
      ::unlink(temporary_.c_str());
      temporary_.clear();
      fail(reason);
    }
    ::flock(handle, LOCK_EX | LOCK_NB);  // where there are no locks, nothing is taken for a leftover either
    struct stat facts{};
    if (::fstat(handle, &facts) == 0 && facts.st_nlink > 0) return;
    file_.reset();  // another process took it for a leftover before it was locked
  }
  temporary_.clear();
  fail(EBUSY);
}

void Replacement::removeLeftovers() const {
  const std::string folder = folderOf(target_), start = "." + baseName(target_) + ".";
  DIR* const entries = ::opendir(folder.c_str());
  if (entries == nullptr) return;
  while (const dirent* const entry = ::readdir(entries)) {
    if (!isLeftover(entry->d_name, start)) continue;
    const std::string path = joined(folder, entry->d_name);
    const int handle = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (handle < 0) continue;
    struct stat facts{};
    if (::fstat(handle, &facts) == 0 && S_ISREG(facts.st_mode) && ::flock(handle, LOCK_EX | LOCK_NB) == 0) {
      ::unlink(path.c_str());
    }
    ::close(handle);
  }
  ::closedir(entries);
}

void Replacement::fail(int reason) const {
  fail(std::strerror(reason));
}

void Replacement::fail(const char* reason) const {
  throw Error(Code::kUsage, problem("state file", "'" + path_ + "' (" + reason + ")", "a file that can be written",
                                    "choose another path"));
}

}  // namespace sinkrt
