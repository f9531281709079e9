{{- /* What a hospital node has beside the shared parts: policy, data, perhaps a GPU. */ -}}
{{- define "chart.role" -}}hospital{{- end }}
{{- define "chart.open" -}}names and {{ include "dialing.open" . }}{{- end }}
{{- define "chart.kept" -}}the privacy ledger{{- end }}
{{- define "chart.tag" -}}{{ .Chart.AppVersion }}-{{ .Values.gpu.count | int | eq 0 | ternary "cpu" "cuda" }}{{- end }}
{{- define "chart.check" -}}["site", "check", "--config", "/etc/wardround/config/config.yaml", "--connect"]{{- end }}
{{- define "chart.annotations" -}}{{- end }}
{{- define "chart.podAnnotations" -}}{{- end }}
{{- define "chart.env" -}}{{- end }}
{{- define "chart.ports" -}}{{- end }}

{{- define "chart.config" -}}
{{ include "dialing.config" . }}
policy: /etc/wardround/documents/policy.yaml
data: /data/images
{{- if .Values.backbones.existingClaim }}
backbones: /data/backbones
{{- end }}
{{- if and .Values.gpu.count (eq .Values.config.device "auto") }}
device: cuda
{{- end }}
{{- if not .Values.config.threads }}
{{- /* A process sees every core of the node, not its limit: without this it would start a thread for each. */}}
threads: {{ include "chart.cores" . }}
{{- end }}
{{- end }}

{{- /* resources.cpu as a whole number of cores, at least one: "500m" is 1, "2" is 2. */ -}}
{{- define "chart.cores" -}}
{{- $cpu := toString .Values.resources.cpu }}
{{- if hasSuffix "m" $cpu }}{{ $cpu = divf (trimSuffix "m" $cpu | float64) 1000.0 }}{{ end }}
{{- ceil (float64 $cpu) | int | max 1 -}}
{{- end }}

{{- define "chart.documents" -}}
policy.yaml: {{ b64enc .Values.policy }}
{{- end }}

{{- define "chart.validate" -}}
{{- include "dialing.validate" . }}
{{- if not .Values.policy }}{{ fail "policy is empty: add --set-file policy=policy.yaml" }}{{ end }}
{{- $whose := get (fromYaml .Values.policy) "hospital" }}
{{- if not (or (kindIs "bool" $whose) (eq (toString $whose) .Values.config.id)) }}
{{- fail (printf "policy is the policy of %v, config.id is %s: give this hospital's own" $whose .Values.config.id) }}
{{- end }}
{{- if not .Values.data.existingClaim }}
{{- fail "data.existingClaim is empty: name the claim that holds metadata.csv and the images" }}
{{- end }}
{{- include "wardround.present" (dict "root" . "kind" "PersistentVolumeClaim" "name" .Values.data.existingClaim "step" "make it first, or correct data.existingClaim") }}
{{- with .Values.backbones.existingClaim }}
{{- include "wardround.present" (dict "root" $ "kind" "PersistentVolumeClaim" "name" . "step" "make it first, or correct backbones.existingClaim") }}
{{- end }}
{{- end }}

{{- define "chart.runtimeClass" -}}
{{- if .Values.gpu.count }}{{ .Values.gpu.runtimeClassName }}{{ end }}
{{- end }}

{{- define "chart.resources" -}}
{{- $amounts := dict "cpu" (toString .Values.resources.cpu) "memory" .Values.resources.memory "ephemeral-storage" .Values.resources.ephemeralStorage }}
{{- if .Values.gpu.count }}{{ $_ := set $amounts .Values.gpu.resource (int .Values.gpu.count) }}{{ end }}
{{- dict "requests" $amounts "limits" $amounts | toYaml }}
{{- end }}

{{- define "chart.mounts" -}}
- {name: admin, mountPath: /run/wardround}
- name: data
  mountPath: /data/images
  readOnly: true
  {{- with .Values.data.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- if .Values.backbones.existingClaim }}
- {name: backbones, mountPath: /data/backbones, readOnly: true}
{{- end }}
{{- end }}

{{- define "chart.volumes" -}}
- name: admin
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: data
  persistentVolumeClaim: {claimName: {{ .Values.data.existingClaim }}, readOnly: true}
{{- with .Values.backbones.existingClaim }}
- name: backbones
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}
