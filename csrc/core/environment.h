// The environment variables of dispatch. Read once, at the first call.
#pragma once

#include <string>

namespace fastattn {

struct Environment {
    std::string kernel;  // FASTATTN_KERNEL
    std::string device;  // FASTATTN_DEVICE
    bool verbose = false;  // FASTATTN_VERBOSE=1
    bool tf32 = false;     // FASTATTN_TF32=1
};

const Environment& environment();

}  // namespace fastattn
