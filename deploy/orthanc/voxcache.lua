-- Tells voxcache of stable series and studies, changed metadata and deletions.
--
-- Name this file in Orthanc's configuration: "LuaScripts": ["/etc/orthanc/voxcache.lua"]. Set in Orthanc's environment:
--   VOXCACHE_ARRIVALS   where to post; http://127.0.0.1:8600/v1/arrivals/orthanc unless it is set
--   VOXCACHE_TOKEN      the bearer token, if webhooks.secrets.orthanc asks for one
--
-- Each post is tried once, and Orthanc waits for it: where voxcache can be down or slow use voxcache.py, or have the
-- changes polled (arrivals.md, "When nothing is sent").

local url = os.getenv("VOXCACHE_ARRIVALS") or "http://127.0.0.1:8600/v1/arrivals/orthanc"
local token = os.getenv("VOXCACHE_TOKEN") or ""

-- Of what is deleted Orthanc tells the id alone, so UIDs are remembered by it.
local known = {}

local function uids(level, id)
  local resource = ParseJson(RestApiGet("/" .. level .. "/" .. id))
  if level == "studies" then
    return {StudyInstanceUID = resource["MainDicomTags"]["StudyInstanceUID"]}
  end
  local study = ParseJson(RestApiGet("/studies/" .. resource["ParentStudy"]))
  return {
    StudyInstanceUID = study["MainDicomTags"]["StudyInstanceUID"],
    SeriesInstanceUID = resource["MainDicomTags"]["SeriesInstanceUID"],
    Modality = resource["MainDicomTags"]["Modality"],
    Instances = #resource["Instances"],
  }
end

local function post(change, id, told, time)
  told["ChangeType"] = change
  told["ID"] = id
  told["LastUpdate"] = time
  local headers = {["Content-Type"] = "application/json"}
  if token ~= "" then
    headers["Authorization"] = "Bearer " .. token
  end
  -- with true a UID such as "12" stays text; but numbers turn into text then
  local body = string.gsub(DumpJson(told, true), '"Instances":"(%d+)"', '"Instances":%1')
  if HttpPost(url, body, headers) == nil then
    print("voxcache was not told of " .. change .. " " .. id)
  end
end

local function announce(change, level, id, metadata)
  local told = uids(level, id)
  known[id] = {StudyInstanceUID = told["StudyInstanceUID"], SeriesInstanceUID = told["SeriesInstanceUID"]}
  post(change, id, told, (metadata or {})["LastUpdate"])
end

local function deleted(id)
  if known[id] ~= nil then
    post("Deleted", id, known[id], os.date("!%Y%m%dT%H%M%S"))
    known[id] = nil
  end
end

function OnStableSeries(id, tags, metadata) announce("StableSeries", "series", id, metadata) end
function OnStableStudy(id, tags, metadata) announce("StableStudy", "studies", id, metadata) end
function OnUpdatedSeries(id) announce("UpdatedMetadata", "series", id) end
function OnUpdatedStudy(id) announce("UpdatedMetadata", "studies", id) end
function OnDeletedSeries(id) deleted(id) end
function OnDeletedStudy(id) deleted(id) end
